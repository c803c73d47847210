"""Baton: language models served from separate prefill and decode services."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.llm import LLM
    from common.engine.sampling_params import SamplingParams

# The threads of torch's OpenMP wait for each other by spinning, 3 ms unless told otherwise: where
# workers share cores, a thread that waits so keeps the one it waits for from running. This many
# turns are tens of microseconds, more than passes between two operations. Read when torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: the gateway and the kvstore import baton.v1 and must not load torch.
    if name == "LLM":
        from baton.llm import LLM

        return LLM
    if name == "SamplingParams":
        from common.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
