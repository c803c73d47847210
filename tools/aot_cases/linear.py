"""The kernels around the matrices, at the shapes of Llama 3 8B."""

from typing import Any

from common.engine.kernels.triton import activation, gemm, norm, quantize, sampling
from common.engine.kernels.triton.quantize import row_tiles
from common.engine.quantization.scheme import Activation
from tools.aot import AotCase

HIDDEN, INTERMEDIATE = 4096, 14336
MULTIPROCESSORS = 132  # of an H100 or H200
MODES = (None, Activation.TENSOR, Activation.TOKEN, Activation.GROUP)


def _form(mode: Activation | None, block: int) -> dict[str, Any]:
    """The arguments that say in which form a row is written."""
    return {
        "out": "*bf16" if mode is None else "*u8",
        "scale": None if mode is None else "*fp32",
        "scale_row": 0 if mode is None else 1,
        "scale_column": 0 if mode is None else 64,
        "MODE": "none" if mode is None else mode.value,
        "BLOCK": block,
        "NATIVE": True,
    }


def _norm(mode: Activation | None, delta: str | None) -> AotCase:
    block, _, warps = row_tiles(HIDDEN, Activation.TOKEN)
    args = {"x": "*bf16", "delta": delta, "weight": "*bf16", "eps": 1e-5, "d": HIDDEN}
    args |= _form(mode, block)
    name = f"rms_norm {'add ' if delta else ''}{mode or 'bf16'}"
    return AotCase(name, norm.rms_norm_kernel, args, {"num_warps": warps})


def _silu(mode: Activation | None) -> AotCase:
    block, _, warps = row_tiles(INTERMEDIATE, mode)
    args = {"gate_up": "*bf16", "d": INTERMEDIATE} | _form(mode, block)
    return AotCase(
        f"silu_mul {mode or 'bf16'}", activation.silu_mul_kernel, args, {"num_warps": warps}
    )


def _rows(mode: Activation) -> AotCase:
    block, _, warps = row_tiles(HIDDEN, mode)
    args = {"x": "*bf16", "d": HIDDEN, "x_row": HIDDEN} | _form(mode, block)
    return AotCase(f"quantize {mode}", quantize.quantize_rows_kernel, args, {"num_warps": warps})


def _matmul(m: int, n: int, k: int, scales: str, invariant: bool = False) -> AotCase:
    fp8 = scales != "none"
    tiles = gemm.choose_tiles(m, n, k, fp8, MULTIPROCESSORS, invariant)
    kind = "fp8e4nv" if fp8 else "bf16"
    args = {
        "x": f"tensordesc<{kind}[{tiles.m}, {tiles.k}]>",
        "w": f"tensordesc<{kind}[{tiles.n}, {tiles.k}]>",
        "out": "*bf16",
        "bias": None,
        "x_scale": "*fp32" if fp8 else None,
        "w_scale": "*fp32" if fp8 else None,
        "partial": "*fp32",
        "arrived": "*i32",
        **{"m": m, "n": n, "k": k},
        **{"xs_row": 1, "xs_column": m, "ws_row": k // 128, "ws_column": 1},
        **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "SPLIT": tiles.split},
        **{"SCALES": scales, "W_GROUP": 128 if scales == "blocks" else 1},
        **{"FP8": fp8, "SWAP": tiles.swap},
    }
    name = f"matmul {m}x{n}x{k} {scales}{' invariant' if invariant else ''}"
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return AotCase(name, gemm.matmul_kernel, args, options)


def _sampling() -> list[AotCase]:
    vocab, rows = 128256, 64
    chunks = -(-vocab // sampling.CHUNK)
    sizes = {"CHUNK": sampling.CHUNK, "CHUNKS": 64, "chunks": chunks, "n": rows, "vocab": vocab}
    pointers = dict.fromkeys(("reals", "totals", "before", "after", "old", "new"), "*fp64")
    pointers |= dict.fromkeys(("parts", "state", "masses"), "*fp64")
    pointers |= dict.fromkeys(("keys", "whole", "cut", "kept", "tokens", "peaks"), "*i64")
    pointers |= {"logits": "*fp32", "ties": "*i32"}
    common = sizes | pointers | {"row_stride": vocab, "shift": 20, "SLICE": sampling.SLICE}
    searches = [
        {"SEARCH": search, "PASS": step, "FIRST": step == 1}
        for search, step in (("top_k", 0), ("top_k", 2), ("top_p", 1), ("top_p", 2))
    ]
    kernels = [
        (sampling.peak_kernel, {}, 4),
        (sampling.begin_kernel, {}, 1),
        *((sampling.narrow_kernel, search, 8) for search in searches),
        *((sampling.settle_kernel, search, 1) for search in (searches[0], searches[2])),
        (sampling.mass_kernel, {}, 4),
        (sampling.pick_kernel, {}, 4),
    ]
    return [
        AotCase(
            " ".join([kernel.__name__, search.get("SEARCH", ""), str(search.get("PASS", ""))]),
            kernel,
            common | search,
            {"num_warps": warps},
        )
        for kernel, search, warps in kernels
    ]


CASES: list[AotCase] = [
    *(_norm(mode, delta) for mode in MODES for delta in (None, "*bf16")),
    *(_silu(mode) for mode in MODES),
    *(_rows(mode) for mode in MODES if mode is not None),
    AotCase(
        "quantize blocks",
        quantize.quantize_blocks_kernel,
        {"x": "*bf16", "out": "*u8", "scale": "*fp32", "rows": HIDDEN, "d": HIDDEN, "x_row": HIDDEN}
        | {"EDGE": 128, "NATIVE": True},
        {"num_warps": 8},
    ),
    _matmul(16, 4096, 14336, "none"),
    _matmul(8192, 6144, 4096, "none"),
    _matmul(64, 28672, 4096, "rows"),
    _matmul(128, 6144, 4096, "rows"),
    _matmul(8192, 6144, 4096, "rows"),
    _matmul(16, 4096, 14336, "blocks"),
    _matmul(128, 6144, 4096, "blocks"),
    _matmul(8192, 6144, 4096, "blocks"),
    _matmul(64, 4096, 4096, "none", invariant=True),
    _matmul(64, 4096, 4096, "blocks", invariant=True),
    *_sampling(),
]
