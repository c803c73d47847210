"""The matrix products of one step on a CPU: the compiled kernel beside oneDNN's, in turns.

    python benchmarks/cpu_products.py [--dtype float32] [--threads N]

The matrices are those of the model of `cpu_peers.py`; every layer has its own, so that a step reads
all of them from memory. The least of several rounds, and what that is in weights and operations.
"""

import argparse
import os
import time

import torch

from common.engine.kernels import Linear
from common.engine.kernels.cpu.linear import CANDIDATES

# Rows and columns of a layer's matrices, and of the head's.
LAYERS, SHAPES, HEAD = 12, ((1280, 768), (768, 768), (4096, 768), (768, 2048)), (8192, 768)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
NAMES = ("onednn", "compiled")


def seconds(linears: list[Linear], inputs: dict[int, torch.Tensor]) -> float:
    """Of one step; `inputs` by their width."""
    shapes = [*SHAPES * LAYERS, HEAD]
    started = time.perf_counter()
    for linear, (_, width) in zip(linears, shapes, strict=True):
        linear(inputs[width])
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    shapes = [*SHAPES * LAYERS, HEAD]
    steps = {
        name: [CANDIDATES[name](torch.randn(s).to(dtype), None) for s in shapes] for name in NAMES
    }
    elements = sum(out * width for out, width in shapes)
    size = elements * dtype.itemsize
    print(f"{args.dtype}, {args.threads} threads, {size / 1e6:.1f} MB of weights\n")
    print("| rows | oneDNN, ms | compiled, ms | ratio | compiled, GB/s | compiled, GFLOP/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width).to(dtype) for width in (768, 2048)}
        best = dict.fromkeys(NAMES, float("inf"))
        for _ in range(args.rounds):
            for name, linears in steps.items():
                best[name] = min(best[name], seconds(linears, inputs))
        one, own = best["onednn"], best["compiled"]
        rates = size / own / 1e9, 2 * elements * rows / own / 1e9
        print(
            f"| {rows} | {one * 1e3:.2f} | {own * 1e3:.2f} | {one / own:.2f} | {rates[0]:.1f} | "
            f"{rates[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
