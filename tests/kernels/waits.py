"""Whether the host waits for a GPU within the steps of a model, found without one.

    python -m tests.kernels.waits SCHEME...      none, fp8, fp8-block; TRITON_INTERPRET unset

A model on torch's `meta` device (tests/engine/no_wait.py) takes steps of Triton's kernels, none of
which is compiled or launched (launches.py). Ends with a traceback where something waits.
"""

import random
import sys
import tempfile
from pathlib import Path

from common.engine import runner as runner_module
from common.engine.kernels.triton.ops import TritonOps
from common.engine.sampling_params import SamplingParams
from tests.engine.driving import make_runner
from tests.engine.no_wait import DEVICE, refused_waits
from tests.engine.zoo import make_checkpoint
from tests.kernels.launches import random_step, record

STEPS = 40


def take_steps(scheme: str | None) -> None:
    ops = TritonOps(DEVICE, multiprocessors=132)
    runner_module.select_ops = lambda *_: ops
    runner_module._device = lambda *_: DEVICE
    runner_module.ModelRunner._capture = lambda _: None
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "head_dim": 64}
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint("llama", False, Path(folder), num_hidden_layers=2, **sizes)
        runner = make_runner(
            path, dtype="bfloat16", quantization=scheme, kv_dtype="fp8_e4m3", num_blocks=200
        )
    rng = random.Random(0)
    with refused_waits():
        for _ in range(STEPS):
            batch = random_step(rng)
            logits = runner.forward(batch)
            assert (logits.device, len(logits)) == (DEVICE, len(batch.logit_rows))
            params = [SamplingParams(top_k=rng.randrange(9)) for _ in range(len(logits))]
            ops.choose(logits, params, [1] * len(logits), [1] * len(logits))
    print(STEPS, "steps")


if __name__ == "__main__":
    record()
    for name in sys.argv[1:]:
        take_steps(None if name == "none" else name)
