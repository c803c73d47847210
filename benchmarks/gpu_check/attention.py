"""Attention and the kernels that only move bytes: their speed beside what the device can do."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_check.report import Report
from common.engine.cache import KVCache
from common.engine.config import RopeConfig
from common.engine.kernels.triton.activation import silu_mul
from common.engine.kernels.triton.decode_attention import decode_attention
from common.engine.kernels.triton.kv_write import write_kv
from common.engine.kernels.triton.norm import rms_norm
from common.engine.kernels.triton.prefill_attention import prefill_attention
from common.engine.kernels.triton.quantize import quantize, quantize_blocks
from common.engine.layers import rope_table
from common.engine.quantization.scheme import Activation
from common.kv.layout import KVLayout

# Of Llama 3 8B.
HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
HIDDEN, INTERMEDIATE = 4096, 14336
# Of the copy's bandwidth, as the project set out.
TARGETS = {"bf16": 0.90, "fp8_e4m3": 0.83}


def run(report: Report) -> None:
    copy = report.copy_rate()
    report.line(f"copy: {copy / 1e9:.0f} GB/s, read and written")
    with report.guard("decode attention"), torch.inference_mode():
        decode(report, copy)
    with report.guard("moving bytes"), torch.inference_mode():
        movers(report, copy)
    with report.guard("KV writes"), torch.inference_mode():
        writes(report, copy)
    with report.guard("prefill attention"), torch.inference_mode():
        prefill(report)


def make_pages(
    report: Report, kv_dtype: str, sequences: int, context: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """payload, scales, and a block table of sequences whose blocks lie in any order."""
    each = -(-context // BLOCK)
    layout = KVLayout(1, KV_HEADS, DIM, BLOCK, kv_dtype)
    cache = KVCache(layout, 1 + sequences * each, report.device)
    if cache.scales is None:
        cache.payload[0].normal_()
    else:
        # No byte of these is NaN.
        cache.data.random_(0, 0x70)
        cache.scales[0].uniform_(0.005, 0.01)
    table = 1 + torch.randperm(sequences * each, device=report.device)
    scales = None if cache.scales is None else cache.scales[0]
    return cache.payload[0], scales, table.view(sequences, each).int()


def decode(report: Report, copy: float) -> None:
    shapes = ((1, 8192), (32, 2048), (64, 4096), (256, 1536)) if report.gpu else ((2, 40),)
    dtype = torch.bfloat16 if report.gpu else torch.float32
    for kv_dtype in ("bf16", "fp8_e4m3") if report.gpu else ("float32", "fp8_e4m3"):
        for sequences, context in shapes:
            payload, scales, table = make_pages(report, kv_dtype, sequences, context)
            q = report.random(sequences, HEADS, DIM, dtype=dtype)
            lengths = torch.full((sequences,), context, dtype=torch.int32, device=report.device)
            pages = payload, scales, table
            call = partial(decode_attention, q, *pages, lengths, context, scale=DIM**-0.5)
            seconds = report.seconds([call] * 4)
            moved = sequences * context * KV_HEADS * 2 * (DIM * payload.element_size())
            moved += 0 if scales is None else sequences * context * KV_HEADS * 2 * 4
            rate = moved / seconds
            text = f"decode attention {kv_dtype} {sequences} x {context}: {rate / 1e9:.0f} GB/s"
            target = TARGETS.get(kv_dtype, 0)
            report.line(f"{text}, {rate / copy:.0%} of copy (target {target:.0%} when large)")
            del payload, scales, table, pages, call


def movers(report: Report, copy: float) -> None:
    n, hidden, inner = (8192, HIDDEN, INTERMEDIATE) if report.gpu else (3, 256, 384)
    x, weight = report.random(n, hidden), report.random(hidden)
    gate_up, delta = report.random(n, 2 * inner), report.random(n, hidden)
    token, group = Activation.TOKEN, Activation.GROUP
    rows = (
        ("quantize tokens", lambda: quantize(x, token), 3 * x.numel()),
        ("quantize 1x128 groups", lambda: quantize(x, group), 3 * x.numel()),
        ("quantize 128x128 blocks", lambda: quantize_blocks(x), 3 * x.numel()),
        ("rms_norm", lambda: rms_norm(x, weight, 1e-5), 4 * x.numel()),
        (
            "rms_norm, add, quantize",
            lambda: rms_norm(x, weight, 1e-5, delta=delta, activation=token),
            7 * x.numel(),
        ),
        (
            "silu * up, quantize",
            lambda: silu_mul(gate_up, activation=token),
            5 * gate_up.numel() // 2,
        ),
    )
    for name, call, moved in rows:
        rate = moved / report.seconds([call] * 4)
        report.line(f"{name}, {n} rows: {rate / 1e9:.0f} GB/s, {rate / copy:.0%} of copy")


def writes(report: Report, copy: float) -> None:
    """RoPE, e4m3 and the write to pages, and what comes into that kernel by option or model."""
    n = 8192 if report.gpu else 20
    payload, scales, table = make_pages(report, "fp8_e4m3", 1, n)
    dtype = torch.bfloat16 if report.gpu else torch.float32
    qkv = report.random(n, HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
    weight = report.random(HEADS + KV_HEADS, DIM, dtype=dtype)
    at = torch.arange(n, device=report.device)
    slots = table[0].long()[at // BLOCK] * BLOCK + at % BLOCK
    rope = tuple(x.to(report.device) for x in rope_table(RopeConfig(), DIM, n))
    # qkv read, Q and e4m3 K and V written.
    moved = n * DIM * (qkv.element_size() * (2 * HEADS + 2 * KV_HEADS) + 2 * KV_HEADS)
    for name, how in (
        ("RoPE and KV write", {}),
        ("the same, Q and K rotated", {"rotate": True}),
        ("the same, Q and K normed", {"qk_norm": (weight, 1e-5)}),
    ):
        call = partial(write_kv, qkv, rope, at, slots, payload, scales, **how)
        rate = moved / report.seconds([call] * 4)
        report.line(f"{name}, {n} tokens: {rate / 1e9:.0f} GB/s, {rate / copy:.0%} of copy")


def prefill(report: Report) -> None:
    shapes = ((1, 8192), (4, 2048), (1, 32768)) if report.gpu else ((1, 20),)
    dtype = torch.bfloat16 if report.gpu else torch.float32
    for sequences, length in shapes:
        n = sequences * length
        q = report.random(n, HEADS, DIM, dtype=dtype)
        work = 4 * HEADS * DIM * sequences * length**2 / 2
        device = report.device
        lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
        starts = torch.arange(0, n + 1, length, dtype=torch.int32, device=device)
        kinds = [("bf16" if report.gpu else "float32", False), ("fp8_e4m3", False)]
        for kv_dtype, products in [*kinds, ("fp8_e4m3", True)]:
            payload, scales, table = make_pages(report, kv_dtype, sequences, length)
            pages = payload, scales, table
            how = {"scale": DIM**-0.5, "fp8_products": products}
            call = partial(prefill_attention, q, *pages, starts, lengths, **how)
            label = f"{kv_dtype} KV{', e4m3 products' if products else ''}"
            tell(report, f"prefill attention {sequences} x {length}, {label}", call, work)
            del payload, scales, table, pages, call
        k, v = (report.random(sequences, HEADS, length, DIM, dtype=dtype) for _ in range(2))
        wide = q.view(sequences, length, HEADS, DIM).transpose(1, 2).contiguous()
        beside(report, wide, k, v, work)


def beside(report: Report, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, work: float) -> None:
    """torch's own, which read K and V of all heads side by side rather than from pages."""
    attend = torch.nn.functional.scaled_dot_product_attention
    tell(report, "   torch SDPA", lambda: attend(q, k, v, is_causal=True), work)
    # One shape: for another it would be compiled anew.
    if not report.gpu or q.shape[0] > 1 or q.shape[2] > 8192:
        return
    with report.others("   torch FlexAttention"):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def causal(b: object, h: object, q_idx: object, kv_idx: object) -> object:
            return q_idx >= kv_idx

        length = q.shape[2]
        mask = create_block_mask(causal, None, None, length, length, device=q.device)
        flex = torch.compile(flex_attention)
        tell(report, "   torch FlexAttention", lambda: flex(q, k, v, block_mask=mask), work)


def tell(report: Report, label: str, call: Callable[[], object], work: float) -> None:
    report.line(f"{label}: {work / report.seconds([call]) / 1e12:.0f} TFLOP/s")
