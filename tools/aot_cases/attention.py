"""The kernels around attention, as a model of 32 query and 8 KV heads calls them."""

from typing import Any

import torch
import triton

from common.engine.kernels.triton.hadamard import ROWS as HADAMARD_ROWS
from common.engine.kernels.triton.hadamard import hadamard_kernel, matrix_size
from common.engine.kernels.triton.kv_write import ROWS, write_kv_kernel
from tools.aot import AotCase

HEADS, KV_HEADS, BLOCK_SIZE, LAYERS = 32, 8, 16, 32


def page_strides(d: int) -> tuple[int, int, int, int, int, int, int]:
    """Of a layer's payload: block, K or V, head, token; of its scales: block, K or V, head."""
    head, layer = BLOCK_SIZE * d, 2 * KV_HEADS * BLOCK_SIZE * d
    return LAYERS * layer, KV_HEADS * head, head, d, LAYERS * layer // d, KV_HEADS * BLOCK_SIZE, 16


def write_kv(name: str, kind: str, d: int, fp8: bool, norm: bool, rotate: bool) -> AotCase:
    strides = page_strides(d)
    args: dict[str, Any] = {
        "qkv": kind,
        "norm": kind if norm else None,
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "slots": "*i64",
        "payload": "*u8" if fp8 else kind,
        "scales": "*fp32" if fp8 else None,
        "rows": 7 * (HEADS + 2 * KV_HEADS),
        "eps": 1e-5,
        **dict(
            zip(
                ("stride_block", "stride_kv", "stride_head", "stride_token"),
                strides[:4],
                strict=True,
            )
        ),
        **dict(
            zip(
                ("scale_block", "scale_kv", "scale_head"),
                strides[4:] if fp8 else (0, 0, 0),
                strict=True,
            )
        ),
        "HEADS": HEADS,
        "KV_HEADS": KV_HEADS,
        "D": d,
        "BLOCK_SIZE": BLOCK_SIZE,
        "ROWS": ROWS,
        "HALF": triton.next_power_of_2(d // 2),
        "ROTATE": rotate,
        "NATIVE": True,
    }
    options = {"num_warps": 8 if rotate else 4, "num_stages": 1, "enable_fp_fusion": False}
    return AotCase(f"write_kv {name}", write_kv_kernel, args, options)


def hadamard(kind: str, d: int) -> AotCase:
    matrix = matrix_size(d, torch.float32 if kind == "*fp32" else torch.float16)
    args = {
        "x": kind, "out": kind, "rows": 4096, "PARTS": d // matrix, "MATRIX": matrix,
        "ROWS": HADAMARD_ROWS, "NORM": d**-0.5,
    }  # fmt: skip
    return AotCase(
        f"hadamard {kind[1:]} {d}", hadamard_kernel, args, {"num_warps": 4, "num_stages": 1}
    )


CASES: list[AotCase] = [
    write_kv("bf16, fp8 pages, d 128", "*bf16", 128, True, False, False),
    write_kv("bf16, fp8 pages, d 128, rotated", "*bf16", 128, True, False, True),
    write_kv("bf16, fp8 pages, d 128, norm", "*bf16", 128, True, True, False),
    write_kv("bf16, fp8 pages, d 96", "*bf16", 96, True, False, False),
    write_kv("bf16, bf16 pages, d 256", "*bf16", 256, False, False, False),
    write_kv("fp32, fp32 pages, d 64", "*fp32", 64, False, False, False),
    write_kv("fp32, fp8 pages, d 256, rotated", "*fp32", 256, True, False, True),
    *(hadamard(kind, d) for kind in ("*bf16", "*fp16", "*fp32") for d in (64, 128, 256, 512)),
]
