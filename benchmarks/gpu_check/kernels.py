"""Every kernel against its reference, on the device, in bf16 and FP8."""

import math
from concurrent.futures import Future

import numpy as np
import torch

from baton.conformance.late import LateBus
from benchmarks.gpu_check.paging import Paged
from benchmarks.gpu_check.report import Report
from common.engine.device_pages import CudaBus, DevicePages
from common.engine.kernels.reference import quantize_fp8
from common.engine.kernels.triton.activation import silu_mul
from common.engine.kernels.triton.gemm import Workspace, matmul
from common.engine.kernels.triton.hadamard import hadamard
from common.engine.kernels.triton.norm import rms_norm
from common.engine.kernels.triton.ops import TritonLinear, TritonOps
from common.engine.kernels.triton.quantize import Quantized, quantize, quantize_blocks
from common.engine.kernels.triton.sampling import SamplingRows, sample
from common.engine.quantization.scheme import Activation
from common.engine.sampler import Sampler
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest, Sequence
from common.engine.weight import Weight
from common.kv.connectors.copies import HostCopies
from common.kv.connectors.pages import copy_layers
from common.kv.layout import KVLayout

EPS = 1e-5
# Of a result rounded once to the compute dtype, and of sums of rounded products.
ROUNDED, SUMMED = 4e-3, 6e-3
QUANTIZED = 2e-2  # of an attention over values with 4 significant bits
MULTIPLIED = 6e-2  # where Q and the probabilities have 4 too


@torch.inference_mode()
def encoding(report: Report) -> None:
    """Every bfloat16 number through the device's own conversion, against torch's on the CPU."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    if not report.gpu:
        numbers = numbers[::64].float()
    x = numbers.view(-1, 256).to(report.device)
    one = torch.ones((), device=report.device)
    code = quantize(x, Activation.TENSOR, one).values.view(torch.uint8).cpu().flatten()
    expected = numbers.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = numbers.isnan()
    right = torch.equal(code[~nan], expected[~nan]) and bool(((code[nan] & 0x7F) == 0x7F).all())
    report.check("e4m3 of every bfloat16 number", right)


@torch.inference_mode()
def quantization(report: Report) -> None:
    n, d = (5, 300) if report.tiny else (1000, 4100)
    x = report.random(n, d)
    values, scale = quantize_fp8(x.cpu())
    tokens = quantize(x, Activation.TOKEN)
    report.same("quantize a token: bytes", tokens.values, values)
    report.same("quantize a token: scales", tokens.scale, scale.view(n, 1))
    padded = torch.nn.functional.pad(x.cpu(), (0, -d % 128)).view(n, -1, 128)
    values, scale = quantize_fp8(padded)
    groups = quantize(x, Activation.GROUP)
    report.same("quantize a group: bytes", groups.values, values.view(n, -1)[:, :d])
    report.same("quantize a group: scales", groups.scale, scale)
    values, scale = quantize_blocks(x)
    wide = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :d]
    report.close("quantize blocks: about values * scale", values.float() * wide, x, 4e-2)
    largest = torch.nn.functional.pad(x.float(), (0, -d % 128, 0, -n % 128)).abs()
    blocks = largest.view(-(-n // 128), 128, -(-d // 128), 128).amax((1, 3)) / 448
    report.close("quantize blocks: scales", scale, blocks, 1e-7)


@torch.inference_mode()
def norms(report: Report) -> None:
    n, d = (3, 256) if report.tiny else (515, 4096)
    x, delta, weight = report.random(n, d), report.random(n, d), report.random(d)
    wide = (x + delta).double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    plain = rms_norm(x.clone(), weight, EPS, delta=delta)
    report.close("rms_norm of a sum", plain, exact, ROUNDED)
    gate_up = report.random(n, 2 * d)
    gate, up = gate_up.double().chunk(2, -1)
    report.close("silu * up", silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, ROUNDED)
    given = torch.full((), 0.02, device=report.device)
    for form in Activation:
        how = {"activation": form, "input_scale": given}
        fused = rms_norm(x.clone(), weight, EPS, delta=delta, **how)
        apart = quantize(plain, form, given)
        # Two compilations may add up a row's squares in another order.
        report.same(f"rms_norm, quantized ({form})", fused.values, apart.values, but_for=1e-3)
        fused, apart = silu_mul(gate_up, **how), quantize(silu_mul(gate_up), form, given)
        report.same(f"silu * up, quantized ({form})", fused.values, apart.values)


@torch.inference_mode()
def rotation(report: Report) -> None:
    for d in (64,) if report.tiny else (64, 128, 256):
        x = report.random(7 if report.tiny else 1001, d)
        matrix = torch.ones(1, 1, dtype=torch.float64, device=report.device)
        for _ in range(int(math.log2(d))):
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        report.close(f"hadamard {d}", hadamard(x), x.double() @ matrix / d**0.5, ROUNDED)


@torch.inference_mode()
def products(report: Report) -> None:
    n, k = (192, 400) if report.tiny else (1536, 4096)
    rows = (1, 20) if report.tiny else (1, 17, 64, 65, 129, 300, 2049)
    workspace = TritonOps(report.device, multiprocessors=None if report.gpu else 2)._workspace
    weight = report.random(n, k)
    codes = report.random_e4m3(n, k)
    by_row = report.random(n, 1, dtype=torch.float32).abs() / 64
    blocks = (-(-n // 128), -(-k // 128))
    by_block = report.random(*blocks, dtype=torch.float32).abs() / 64
    for m in rows:
        x = report.random(m, k)
        exact = x.double() @ weight.double().T
        report.close(f"float product {m}x{n}x{k}", matmul(x, weight, workspace), exact, SUMMED)
        for form, scale in ((Activation.TOKEN, by_row), (Activation.GROUP, by_block)):
            q = quantize(x, form)
            exact = spread(q.values, q.scale) @ spread(codes, scale).T
            label = f"e4m3 product {m}x{n}x{k}, scales by {form}"
            report.close(label, matmul(q, codes, workspace, scale=scale), exact, SUMMED)
    if report.gpu:
        linear = TritonLinear(Weight(codes, by_row, Activation.TOKEN), None, workspace, False)
        q = quantize(report.random(512, k), Activation.TOKEN)
        exact = spread(q.values, q.scale) @ spread(codes, by_row).T
        report.close("e4m3 product 512, by cuBLAS", linear(q), exact, SUMMED)


def spread(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 of e4m3 values with any scales."""
    rows, columns = values.shape
    wide = scale.double()
    wide_values = values.float().double()  # e4m3 to float64 is not there on every device
    if scale.shape[1] > 1:
        wide = wide.repeat_interleave(128, 1)[:, :columns]
    if scale.shape[0] != rows:
        wide = wide.repeat_interleave(128, 0)[:rows]
    return wide_values * wide


@torch.inference_mode()
def kv_writes(report: Report) -> None:
    """Q, K and V normed, turned, rotated, quantized and put into their pages by one kernel."""
    sizes = ((4, 2, 64),) if report.tiny else ((32, 8, 128), (4, 2, 256))
    for heads, kv_heads, d in sizes:
        weight = report.random(heads + kv_heads, d).abs()
        for rotate in (False, True):
            paged = Paged(report, heads, kv_heads, d, "fp8_e4m3", [None], rotate_qk=rotate)
            norm = weight.to(paged.dtype), EPS
            for name, actual, expected in paged.written(9 if report.tiny else 500, norm):
                label = f"{name}, heads of {d}, normed{', rotated' if rotate else ''}"
                # A rounding that falls the other way moves a value of e4m3 by a sixteenth.
                report.close(label, actual, expected, ROUNDED if name == "Q" else 2 * ROUNDED)


@torch.inference_mode()
def attention(report: Report) -> None:
    paged_attention(report, "bf16" if report.gpu else "float32")


@torch.inference_mode()
def attention_e4m3_kv(report: Report) -> None:
    paged_attention(report, "fp8_e4m3")


def paged_attention(report: Report, kv_dtype: str) -> None:
    """KV written and attended to by the Triton kernels, and by the reference in float32."""
    small = ((3, 4), (20, 20), (18, 1))
    large = ((700, 700), (1030, 1), (300, 44), (1, 1), (4000, 1), (2049, 2049), (65, 64), (129, 1))
    for heads, kv_heads, d in ((4, 2, 64),) if report.tiny else ((32, 8, 128), (6, 2, 96)):
        paged = Paged(report, heads, kv_heads, d, kv_dtype, [17] if report.tiny else [None, 64])
        for kind in ("mixed", "decode"):
            sizes = [(c, 1 if kind == "decode" else q) for c, q in (small, large)[report.gpu]]
            for window, actual, expected in paged.attend(sizes):
                label = f"attention, {kind}, {heads}/{kv_heads} heads of {d}, {kv_dtype}"
                report.close(f"{label}, window {window}", actual, expected, QUANTIZED)


@torch.inference_mode()
def fp8_attention(report: Report) -> None:
    """Products in e4m3, and what a rotation does for them where Q and K have outliers."""
    heads, kv_heads, d = (4, 2, 64) if report.tiny else (32, 8, 128)
    sizes = [(20, 20), (18, 5)] if report.tiny else [(700, 700), (2049, 2049), (300, 44), (65, 1)]
    for outliers, rotate in ((1.0, False), (6.0, False), (6.0, True)):
        paged = Paged(
            report, heads, kv_heads, d, "fp8_e4m3", [None, 64], rotate_qk=rotate, outliers=outliers
        )
        for products, bound in ((False, QUANTIZED), (True, MULTIPLIED)):
            label = f"attention, {'e4m3 products, ' if products else ''}outliers x {outliers:g}"
            label += ", rotated" if rotate else ""
            for window, actual, expected in paged.attend(sizes, products):
                report.close(f"{label}, window {window}", actual, expected, bound)


@torch.inference_mode()
def sampling(report: Report) -> None:
    vocab, count = (300, 4) if report.tiny else (128256, 64)
    logits = report.random(count, vocab, dtype=torch.float32) * 3
    logits[::3] = logits[::3].to(torch.bfloat16).float()  # ties
    kinds = ({"temperature": 0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02, "top_p": 0.5})
    params = [SamplingParams(**{"temperature": 0.8, **kinds[i % 5]}) for i in range(count)]
    seeds, positions = [2**63 + i for i in range(count)], list(range(1, count + 1))
    tokens = sample(logits, SamplingRows.of(params, seeds, positions, vocab, report.device))
    sequences = [
        Sequence(EngineRequest("r", [0] * p, how), [0] * p, seed)
        for how, seed, p in zip(params, seeds, positions, strict=True)
    ]
    expected = [s.token for s in Sampler().sample(logits.cpu(), sequences)]
    report.check(f"tokens of {count} rows of {vocab}", tokens.tolist() == expected)


@torch.inference_mode()
def invariance(report: Report) -> None:
    """A row alone and among others, bit for bit."""
    n, k, m = (64, 272, 70) if report.tiny else (4096, 4096, 1000)
    workspace = Workspace.on(report.device, None if report.gpu else 2)
    x, weight, codes = report.random(m, k), report.random(n, k), report.random_e4m3(n, k)
    scale = torch.ones(n, 1, device=report.device)
    tokens = quantize(x, Activation.TOKEN)
    one = {"batch_invariant": True}
    whole = (
        matmul(x, weight, workspace, **one),
        matmul(tokens, codes, workspace, scale=scale, **one),
    )
    for first, last in ((0, 1), (0, 17), (64, 65)):
        part = Quantized(tokens.values[first:last], tokens.scale[first:last], tokens.dtype)
        alone = matmul(x[first:last], weight, workspace, **one)
        report.same(f"float rows {first}:{last}", alone, whole[0][first:last])
        alone = matmul(part, codes, workspace, scale=scale, **one)
        report.same(f"e4m3 rows {first}:{last}", alone, whole[1][first:last])
    normed = rms_norm(x, torch.ones(k, dtype=x.dtype, device=x.device), EPS)
    ones = torch.ones(k, dtype=x.dtype, device=x.device)
    report.same("rms_norm of a row", rms_norm(x[5:6], ones, EPS), normed[5:6])
    paged = Paged(report, 4, 2, 64, "fp8_e4m3", [None], batch_invariant=True)
    if report.gpu:  # numpy's products, which the interpreter takes, are not the same in any row
        report.same("attention of a prompt and of its last token", *paged.cut_and_whole())


def pages(report: Report) -> None:
    """Pages written and copied while the device is busy, as connectors do it between steps: nobody
    waits, and each copy is of its own moment."""
    layout = KVLayout(4, 2, 64, 16, "fp8_e4m3")
    count, rounds = (4, 2) if report.tiny else (600, 5)  # more bytes than a piece of pinned memory
    data = torch.zeros(count, layout.block_bytes, dtype=torch.uint8, device=report.device)
    there = DevicePages(data, layout, CudaBus(report.device) if report.gpu else LateBus())
    copies, ids = HostCopies(there, layout), list(range(count))
    rng, some = np.random.default_rng(0), range(1, 3)
    written = [rng.integers(0, 256, data.shape, dtype=np.uint8) for _ in range(rounds)]
    square = report.random(8192, 8192) if report.gpu else None

    def ask() -> list[tuple[Future[list[memoryview]], Future[memoryview]]]:
        asked = []
        for rows in written:
            there.write(ids, rows)
            asked.append((copies.pages(ids), copies.layers(ids[::-1], some)))
        return asked

    done = [(whole.result(60), part.result(60)) for whole, part in ask()]  # takes all memory
    if square is not None:
        for _ in range(64):  # a tenth of a second at least
            torch.mm(square, square)
    asked = ask()
    if square is not None:
        stream = torch.cuda.current_stream(report.device)
        report.check("nobody waited to write or to copy pages", not stream.query())
    later = [(whole.result(60), part.result(60)) for whole, part in asked]
    for when, found in (("idle", done), ("busy", later)):
        right = all(
            np.array_equal(np.stack(whole), rows)
            and part == copy_layers(torch.from_numpy(rows), layout, ids[::-1], some)
            for (whole, part), rows in zip(found, written, strict=True)
        )
        report.check(f"{rounds} times {count} pages, the device {when}", right)
    copies.close()
