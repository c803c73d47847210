"""The matrix products of one step on a CPU: the compiled kernel beside oneDNN's, in turns, or that
of FP8 matrices beside it.

    python benchmarks/cpu_products.py [--dtype float32] [--threads N]
    python benchmarks/cpu_products.py --quantization fp8

The matrices are those of the model of `cpu_peers.py`; every layer has its own, so that a step reads
all of them from memory. FP8 products quantize their input; the head is not FP8. The least of some
rounds, and what that is in weights and operations.
"""

import argparse
import os
import time

import torch

from common.engine.kernels import Linear
from common.engine.kernels.cpu.linear import CANDIDATES
from common.engine.kernels.cpu.quantized import Fp8Linear
from common.engine.quantization.fp8 import quantize_weight
from common.engine.quantization.scheme import SCHEMES

# Rows and columns of a layer's matrices, and of the head's.
LAYERS, SHAPES, HEAD = 12, ((1280, 768), (768, 768), (4096, 768), (768, 2048)), (8192, 768)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def seconds(linears: list[Linear], inputs: dict[int, torch.Tensor]) -> float:
    """Of one step; `inputs` by their width."""
    shapes = [*SHAPES * LAYERS, HEAD]
    started = time.perf_counter()
    for linear, (_, width) in zip(linears, shapes, strict=True):
        linear(inputs[width])
    return time.perf_counter() - started


def make(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Linear:
    """A matrix of random numbers; `name` is a candidate for float ones, or an FP8 scheme."""
    weight = torch.randn(shape)
    if name in SCHEMES and shape != HEAD:
        return Fp8Linear(quantize_weight(weight, SCHEMES[name]), None)
    return CANDIDATES["compiled" if name in SCHEMES else name](weight.to(dtype), None)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=SCHEMES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    names = ("compiled", args.quantization) if args.quantization else ("onednn", "compiled")
    shapes = [*SHAPES * LAYERS, HEAD]
    steps = {name: [make(name, shape, dtype) for shape in shapes] for name in names}
    elements = sum(out * width for out, width in shapes)
    size = elements * dtype.itemsize
    if args.quantization:
        size = elements + HEAD[0] * HEAD[1] * (dtype.itemsize - 1)
    beside, own = names
    print(f"{args.dtype}, {args.threads} threads; {own}: {size / 1e6:.1f} MB of weights\n")
    print(f"| rows | {beside}, ms | {own}, ms | ratio | {own}, GB/s | {own}, GFLOP/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width).to(dtype) for width in (768, 2048)}
        best = dict.fromkeys(names, float("inf"))
        for _ in range(args.rounds):
            for name, linears in steps.items():
                best[name] = min(best[name], seconds(linears, inputs))
        one, two = best[beside], best[own]
        rates = size / two / 1e9, 2 * elements * rows / two / 1e9
        print(
            f"| {rows} | {one * 1e3:.2f} | {two * 1e3:.2f} | {one / two:.2f} | {rates[0]:.1f} | "
            f"{rates[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
