"""Matrix products at the shapes of Llama 3 8B, beside torch's and what the device can do."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_check.report import Report
from common.engine.kernels.triton.gemm import Workspace, matmul
from common.engine.kernels.triton.quantize import quantize
from common.engine.quantization.scheme import Activation

SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096)}
SHAPES["down"] = (4096, 14336)
TOKENS = (1, 16, 64, 128, 256, 2048, 8192)


def run(report: Report) -> None:
    with report.guard("ceilings"), torch.inference_mode():
        ceilings(report)
    shapes, tokens = (SHAPES, TOKENS) if report.gpu else ({"qkv": (192, 256)}, (1, 20))
    for name, (n, k) in shapes.items():
        with report.guard(name), torch.inference_mode():
            product(report, name, n, k, tokens)


def ceilings(report: Report) -> None:
    size = 8192 if report.gpu else 64
    report.line(f"copy: {report.copy_rate() / 1e9:.0f} GB/s")
    x, y = report.random(size, size), report.random(size, size)
    work = 2 * size**3
    seconds = report.seconds([lambda: x @ y])
    report.line(f"{x.dtype} product of {size}, by torch: {work / seconds / 1e12:.0f} TFLOP/s")
    if report.gpu:
        a, b = report.random_e4m3(size, size), report.random_e4m3(size, size)
        one = torch.ones((), device=report.device)

        def scaled() -> torch.Tensor:
            return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        rate = work / report.seconds([scaled]) / 1e12
        report.line(f"e4m3 product of {size}, by torch: {rate:.0f} TFLOP/s")


def product(report: Report, name: str, n: int, k: int, tokens: tuple[int, ...]) -> None:
    """Cold weights: the calls rotate among so many that none is in the L2 cache any more."""
    copies = report.copies(n * k)
    workspace = Workspace.on(report.device, None if report.gpu else 2)
    weights = [report.random_e4m3(n, k) for _ in range(copies)]
    by_row = torch.ones(n, 1, device=report.device)
    by_block = torch.ones(-(-n // 128), -(-k // 128), device=report.device)
    for m in tokens:
        x = report.random(m, k)
        token, group = quantize(x, Activation.TOKEN), quantize(x, Activation.GROUP)
        rows = {
            "rows": [partial(matmul, token, w, workspace, scale=by_row) for w in weights],
            "blocks": [partial(matmul, group, w, workspace, scale=by_block) for w in weights],
        }
        if report.gpu:
            rows["torch rows"] = torch_rows(token.values, token.scale, weights, by_row)
        report.line(f"{name} {m}x{n}x{k}: {', '.join(rates(report, rows, m, n, k))}")


def torch_rows(
    x: torch.Tensor, scale: torch.Tensor, weights: list[torch.Tensor], by_row: torch.Tensor
) -> list[Callable[[], torch.Tensor]]:
    scales = {"scale_a": scale.contiguous(), "scale_b": by_row.t()}
    return [
        lambda w=w: torch._scaled_mm(x, w.t(), out_dtype=torch.bfloat16, **scales) for w in weights
    ]


def rates(
    report: Report, rows: dict[str, list[Callable[[], torch.Tensor]]], m: int, n: int, k: int
) -> list[str]:
    found = []
    for name, calls in rows.items():
        with report.others(name) if name.startswith("torch") else report.guard(name):
            seconds = report.seconds(calls)
            moved = n * k + m * k + 2 * m * n
            found.append(
                f"{name} {2 * m * n * k / seconds / 1e12:.0f} TFLOP/s {moved / seconds / 1e9:.0f} "
                "GB/s"
            )
    return found
