"""A few faults of a fixed seed; `make chaos` runs as many as one likes."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.chaos.network import available
from tests.chaos.run import chaos
from tests.chaos.services import ChaosMesh


# Under CI nothing is skipped: there it fails, and says what is missing.
@pytest.mark.skipif("CI" not in os.environ and not available(), reason="needs root and `ip netns`")
def test_a_disturbed_mesh_answers_as_an_undisturbed_one_and_keeps_nothing(tmp_path: Path) -> None:
    with ChaosMesh(tmp_path) as mesh:
        assert asyncio.run(chaos(mesh, seed=11, faults=12)) == []
