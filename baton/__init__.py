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
# What is prepared for a product is kept for every number of rows that there ever was, a quarter of
# a MiB and more in each of two caches: by torch, and by oneDNN, which has two entries a product.
# With their own 1024 entries a worker grows by hundreds of MiB; these hold a dozen sizes of a step,
# and to prepare another one takes a millisecond. Read at the first product.
for _name, _entries in (("LRU_CACHE_CAPACITY", 64), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", 128)):
    os.environ.setdefault(_name, str(_entries))

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
