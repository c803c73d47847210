"""The kernels around attention, as a model of 32 query and 8 KV heads calls them."""

from typing import Any

import torch
import triton
import triton.language as tl

from common.engine.kernels.triton.decode_attention import (
    MAX_SPLITS,
    SPLIT_TOKENS,
    decode_kernel,
    merge_kernel,
    tile_config,
)
from common.engine.kernels.triton.hadamard import ROWS as HADAMARD_ROWS
from common.engine.kernels.triton.hadamard import hadamard_kernel, matrix_size
from common.engine.kernels.triton.kv_write import ROWS, write_kv_kernel
from common.engine.kernels.triton.pages import LOG2_E, compute_type
from common.engine.kernels.triton.prefill_attention import prefill_fp8_kernel, prefill_kernel
from common.engine.kernels.triton.prefill_attention import tile_config as prefill_config
from tools.aot import AotCase

# Words that the assembler keeps aside once, before and after the loops over keys. (It stops at 168
# and at 255 registers; a loop that spills has hundreds of bytes.)
ASIDE_BYTES = 128
# Triton before 3.7 spills in e4m3 products' loop over masked tiles, a chunk's last ones. Tiles of
# half the length would not, but take a quarter more instructions a key in the loop over the rest.
MASKED_BYTES = 328 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else ASIDE_BYTES
HEADS, KV_HEADS, BLOCK_SIZE, LAYERS = 32, 8, 16, 32
SIZES = {"*fp16": 2, "*bf16": 2, "*fp32": 4}


def page_strides(d: int, fp8: bool) -> dict[str, int]:
    """Of a layer of the cache, in elements."""
    head, layer = BLOCK_SIZE * d, 2 * KV_HEADS * BLOCK_SIZE * d
    strides = {
        "stride_block": LAYERS * layer, "stride_kv": KV_HEADS * head, "stride_head": head,
        "stride_token": d, "scale_block": LAYERS * layer // d + LAYERS * layer // 4,
        "scale_kv": KV_HEADS * BLOCK_SIZE, "scale_head": BLOCK_SIZE,
    }  # fmt: skip
    if fp8:
        return strides
    return strides | {"scale_block": 0, "scale_kv": 0, "scale_head": 0}


def write_kv(
    name: str, kind: str, d: int, fp8: bool, *, norm: bool = False, rotate: bool = False,
    static: bool = False,
) -> AotCase:  # fmt: skip
    args: dict[str, Any] = {
        "qkv": kind,
        "norm": kind if norm else None,
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "slots": "*i64",
        "payload": "*u8" if fp8 else kind,
        "scales": "*fp32" if fp8 else None,
        "static": "*fp32" if static else None,
        "rows": 7 * (HEADS + 2 * KV_HEADS),
        "eps": 1e-5,
        **page_strides(d, fp8),
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


def decode(kind: str, fp8: bool, d: int, group: int, compute: torch.dtype) -> AotCase:
    heads = group * KV_HEADS
    tile, warps, stages = tile_config(d, 1 if fp8 else SIZES[kind], compute_type(compute, fp8))
    args = {
        "q": kind, "payload": "*i16" if fp8 else kind, "scales": "*fp32" if fp8 else None,
        "table": "*i32", "contexts": "*i32", "out": kind, "partial": "*fp32", "lse": "*fp32",
        "scale": d**-0.5 * LOG2_E, "window": 0, "q_row": (heads + 2 * KV_HEADS) * d, "q_head": d,
        **page_strides(d, fp8),
        "table_row": 81, "out_row": heads * d, "out_head": d, "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)), "D": d,
        "WIDTH": triton.next_power_of_2(d // 2), "BLOCK_SIZE": BLOCK_SIZE, "TILE": tile,
        "SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": MAX_SPLITS, "FP8": fp8,
        "COMPUTE": compute_type(compute, fp8), "NATIVE": True,
    }  # fmt: skip
    return AotCase(
        f"decode {kind[1:]}, {'fp8' if fp8 else kind[1:]} pages, d {d}, group {group}",
        decode_kernel,
        args,
        {"num_warps": warps, "num_stages": stages},
        spill_bytes=ASIDE_BYTES,
    )


def merge(kind: str, d: int) -> AotCase:
    args = {
        "partial": "*fp32", "lse": "*fp32", "contexts": "*i32", "out": kind, "stride": 6,
        "window": 0,        "out_row": HEADS * d, "out_head": d, "HEADS": HEADS, "D": d,
        "COLUMNS": triton.next_power_of_2(d), "TILE": tile_config(d, 1, tl.float16)[0],
        "SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": MAX_SPLITS,
    }  # fmt: skip
    return AotCase(
        f"merge {kind[1:]}, d {d}", merge_kernel, args, {"num_warps": 4, "num_stages": 1}
    )


def prefill(
    kind: str, fp8: bool, d: int, group: int, eight: bool = False, **changed: int
) -> AotCase:
    heads = group * KV_HEADS
    compute = compute_type({"*bf16": torch.bfloat16, "*fp32": torch.float32}[kind], fp8)
    rows, tile, warps, stages = prefill_config(d, group, compute, fp8, eight)
    payload = "*u8" if eight else "*i16" if fp8 else kind
    args = {
        "q": kind, "payload": payload, "scales": "*fp32" if fp8 else None, "table": "*i32",
        "query_start": "*i32", "contexts": "*i32", "out": kind, "scale": d**-0.5 * LOG2_E,
        "window": 1, "sequences": 1, "q_row": (heads + 2 * KV_HEADS) * d, "q_head": d,
        **page_strides(d, fp8), "table_row": 81, "out_row": heads * d, "out_head": d,
        "GROUP": group, "ROWS": rows, "D": d,
        "WIDTH": triton.next_power_of_2(d) // (1 if eight else 2), "BLOCK_SIZE": BLOCK_SIZE,
        "TILE": tile, "FP8": fp8, "COMPUTE": compute, "NATIVE": True, **changed,
    }  # fmt: skip
    return AotCase(
        f"prefill {kind[1:]}, {payload[1:]} pages, d {d}, group {group}",
        prefill_fp8_kernel if eight else prefill_kernel,
        args,
        {"num_warps": warps, "num_stages": stages},
        spill_bytes=MASKED_BYTES if eight and d <= 128 else ASIDE_BYTES,
    )


CASES: list[AotCase] = [
    write_kv("bf16, fp8 pages, d 128", "*bf16", 128, True),
    write_kv("bf16, fp8 pages, d 128, static", "*bf16", 128, True, static=True),
    write_kv("bf16, fp8 pages, d 128, rotated", "*bf16", 128, True, rotate=True),
    write_kv("bf16, fp8 pages, d 128, norm", "*bf16", 128, True, norm=True),
    write_kv("bf16, fp8 pages, d 128, norm, rotated", "*bf16", 128, True, norm=True, rotate=True),
    write_kv("bf16, fp8 pages, d 32, rotated", "*bf16", 32, True, rotate=True),
    write_kv("bf16, fp8 pages, d 96", "*bf16", 96, True),
    write_kv("bf16, bf16 pages, d 256", "*bf16", 256, False),
    write_kv("fp32, fp32 pages, d 64", "*fp32", 64, False),
    write_kv("fp32, fp8 pages, d 256, rotated", "*fp32", 256, True, rotate=True),
    *(decode("*bf16", True, d, 4, torch.bfloat16) for d in (64, 96, 128, 256)),
    *(decode("*bf16", False, d, 4, torch.bfloat16) for d in (128, 256)),
    decode("*bf16", True, 128, 32, torch.bfloat16),
    *(decode("*fp32", fp8, 256, 4, torch.float32) for fp8 in (True, False)),
    merge("*bf16", 256),
    *(
        prefill("*bf16", fp8, d, 4, eight)
        for d in (128, 256)
        for fp8, eight in ((True, True), (True, False), (False, False))
    ),
    prefill("*bf16", True, 64, 1),
    prefill("*bf16", True, 96, 4, True),
    prefill("*bf16", False, 96, 8),
    prefill("*bf16", True, 128, 7, table_row=1),
    *(prefill("*fp32", fp8, 256, 4) for fp8 in (True, False)),
    *(hadamard("*bf16", d) for d in (64, 128, 256, 512)),
    hadamard("*fp32", 512),
]
