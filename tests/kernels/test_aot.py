"""Every Triton kernel compiles for Hopper on a machine without a GPU."""

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(900)  # a minute of compiling, by one core
def test_every_kernel_compiles_for_sm_90_without_unexpected_spills(capsys):
    # A process of its own: in this one Triton interprets, and defines no kernel to compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tools.aot"], env=environment, capture_output=True, text=True
    )
    with capsys.disabled():  # the table is to be read where all is well, too
        print(f"\n{run.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr
