"""What Triton would compile for the steps of a model on a GPU, found without one.

    python -m tests.kernels.launches SCHEME...      none, fp8, fp8-block; TRITON_INTERPRET unset

Triton's driver is replaced by one that says "Hopper", and its hook before a compilation notes what
is asked for and turns it down, so that nothing is launched either. Prints the kernels of the
warm-up, and those that later steps ask for beside them.
"""

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from common.engine import runner as runner_module
from common.engine.batch import Batch
from common.engine.graphs import StaticBatch, bucket_sizes, warm_up
from common.engine.kernels.triton.ops import TritonOps
from common.engine.sampling_params import SamplingParams
from tests.engine.driving import make_runner
from tests.engine.zoo import MAX_LEN, VOCAB, make_checkpoint

CPU = torch.device("cpu")
SEQUENCES, TOKENS, BLOCK = 48, 1500, 16


class Hopper:
    """As much of a Triton driver as is asked before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record() -> set[tuple[str, str]]:
    """Fills up with the name and the specialization of every kernel that is launched."""
    found: set[tuple[str, str]] = set()

    def note(*, key, fn, **_) -> bool:
        found.add((fn.name, key))
        return True  # neither compile nor launch

    driver.set_active(Hopper())
    knobs.runtime.jit_cache_hook = note
    return found


def random_step(rng: random.Random) -> Batch:
    """Sequences that decode, then chunks, with any contexts."""
    queries = [1] * rng.randrange(40) + [rng.randrange(1, 400) for _ in range(rng.randrange(1, 4))]
    contexts = tuple(n + rng.randrange(MAX_LEN - n) for n in queries)
    starts = [0]
    for count in queries:
        starts.append(starts[-1] + count)
    whole = torch.zeros(3, starts[-1], dtype=torch.int64)
    table = torch.zeros(len(queries), -(-max(contexts) // BLOCK), dtype=torch.int32)
    rows = torch.arange(rng.randrange(len(queries)) + 1)
    return Batch(*whole, tuple(starts), contexts, table, rows)


def serve(forward: Callable[[Batch], torch.Tensor], ops: TritonOps) -> None:
    rng = random.Random(0)
    kinds = [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.5}]
    for _ in range(150):
        logits = forward(random_step(rng))
        params = [SamplingParams(**rng.choice(kinds)) for _ in range(len(logits))]
        ops.choose(logits.float(), params, [1] * len(logits), [1] * len(logits))


def later_kernels(scheme: str | None, launched: set[tuple[str, str]]) -> None:
    """Warms a model up as its runner does on a GPU, serves, and prints what was launched."""
    made: list[TritonOps] = []

    def make_ops(*_: object) -> TritonOps:
        made.append(TritonOps(CPU, multiprocessors=132))
        return made[0]

    runner_module.select_ops = make_ops
    launched.clear()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sizes = {"hidden_size": 384, "intermediate_size": 1024, "head_dim": 64}
        path = make_checkpoint("llama", False, Path(folder), num_hidden_layers=2, **sizes)
        runner = make_runner(
            path, dtype="bfloat16", quantization=scheme, kv_dtype="fp8_e4m3", num_blocks=200,
            max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS,
        )  # fmt: skip
        (ops,) = made

        def forward(batch: Batch) -> torch.Tensor:
            return runner._model.forward(batch, runner._cache, None)

        warm_up(forward, ops.prompt_lengths(TOKENS), MAX_LEN, BLOCK, CPU)
        ops.warm_up(VOCAB)
        static = StaticBatch(SEQUENCES, MAX_LEN // BLOCK, MAX_LEN, CPU)
        for size in bucket_sizes(SEQUENCES):
            forward(static.of_size(size))
        warm = set(launched)
        serve(forward, ops)
    print("warm:", dict(Counter(name for name, _ in warm)))
    print("later:", dict(Counter(name for name, _ in launched - warm)))


if __name__ == "__main__":
    found = record()
    for name in sys.argv[1:]:
        later_kernels(None if name == "none" else name, found)
