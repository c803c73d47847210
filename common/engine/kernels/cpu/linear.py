"""Float matrices, laid out for this machine when they are loaded.

Which way is fastest, and whether it is there at all, differs between CPUs and builds of torch:
the candidates are tried once, on a small product whose result is known in float64.
"""

import time
from collections.abc import Callable
from functools import cache, partial

import structlog
import torch
import torch.nn.functional as F

from common.engine.kernels import Linear
from common.engine.kernels.cpu.matmul import CompiledLinear
from common.engine.weight import Weight

log = structlog.get_logger("kernels")

# Products of the sizes that decoding and chunks have: too big for the nearest cache, quick to try.
PROBE_ROWS, PROBE_OUT, PROBE_IN = (1, 16, 128), 1024, 1024
# What a candidate must take at most, as a part of the compiled kernel's time, to be taken instead:
# two machines of one kind should not choose differently by chance.
CLEARLY_FASTER = 0.75
PROBE_ROUNDS = 5
# Largest difference from float64, as a part of the largest result: the rounding of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# Rows of a piece of a batch-invariant product.
TILE_ROWS = 16

Pack = Callable[[torch.Tensor, torch.Tensor | None], Linear]


def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """torch's own way with a matrix as it is."""
    return partial(F.linear, weight=weight, bias=bias)


class OneDnnLinear:
    """oneDNN's layout, up to twice as fast. The matrix itself is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out = len(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, self.out)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


CANDIDATES: dict[str, Pack] = {"compiled": CompiledLinear, "onednn": OneDnnLinear, "plain": plain}


@cache
def best(dtype: torch.dtype, fits: bool) -> Pack:
    """The fastest candidate whose results are right, for matrices of this dtype. Not `fits`: but
    for the compiled kernel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PROBE_OUT, PROBE_IN, generator=generator).to(dtype)
    inputs = [torch.randn(n, PROBE_IN, generator=generator).to(dtype) for n in PROBE_ROWS]
    times = {}
    for name, pack in CANDIDATES.items():
        if name == "compiled" and not fits:
            continue
        try:
            times[name] = _try(pack(weight, None), weight, inputs, TOLERANCE[dtype])
        except RuntimeError as error:  # this build or CPU lacks it
            log.info("linear_unavailable", candidate=name, dtype=str(dtype), error=str(error))
    chosen = min(
        times, key=lambda name: times[name] * (CLEARLY_FASTER if name == "compiled" else 1)
    )
    seconds = {name: round(value, 6) for name, value in times.items()}
    log.info("linear_chosen", dtype=str(dtype), chosen=chosen, seconds=seconds)
    return CANDIDATES[chosen]


class TiledLinear:
    """A Linear in pieces of TILE_ROWS rows, the last one filled up with zeros: always the same
    product, so that a row's bits depend on that row alone, whatever else is in the step.

    A library may still treat the rows of a piece differently (by the place in its own blocks); a
    matrix with which it does is multiplied row by row.
    """

    def __init__(self, linear: Linear, weight: Weight) -> None:
        out, width = weight.values.shape
        self.linear, self.out, self.rows = linear, out, TILE_ROWS
        row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
        dtype = weight.values.dtype if weight.activation is None else torch.float32
        tile = linear(row.to(dtype).expand(TILE_ROWS, -1).contiguous())
        if not torch.equal(tile, tile[:1].expand_as(tile)):
            self.rows = 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count, width = x.shape
        whole = -(-count // self.rows) * self.rows
        if whole > count:
            x = torch.cat((x, x.new_zeros(whole - count, width)))
        out = x.new_empty(whole, self.out)
        for first in range(0, whole, self.rows):
            out[first : first + self.rows] = self.linear(x[first : first + self.rows])
        return out[:count]


def _try(
    linear: Linear, weight: torch.Tensor, inputs: list[torch.Tensor], tolerance: float
) -> float:
    """Seconds of one product of each input on one thread, for which nobody else's work matters
    much; infinite when a result is wrong."""
    seconds, threads = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for x in inputs:
            want = x.double() @ weight.double().T
            if (linear(x).double() - want).abs().amax() > tolerance * want.abs().amax():
                return float("inf")
            seconds += min(_once(linear, x) for _ in range(PROBE_ROUNDS))
    finally:
        torch.set_num_threads(threads)
    return seconds


def _once(linear: Linear, x: torch.Tensor) -> float:
    started = time.perf_counter()
    linear(x)
    return time.perf_counter() - started
