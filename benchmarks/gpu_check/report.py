"""How sections check, measure and print."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

# Measured again and again until this much time has passed on the device.
MEASURE_S = 0.05
# Rotating among calls that together read this much keeps each from finding its data in the L2.
COLD_BYTES = 256 * 2**20


class Report:
    """Prints as it goes and counts what failed.

    folder     empty, and this process's own
    deadline   when this process is stopped, by time.monotonic()
    compiling  each call that would be timed is made once, so that its kernels are compiled
    dtype      what models compute in on this device: the interpreter cannot do bfloat16
    """

    def __init__(
        self,
        device: torch.device,
        tiny: bool,
        *,
        folder: Path,
        deadline: float,
        compiling: bool = False,
    ) -> None:
        self.device = device
        self.tiny = tiny
        self.folder, self.compiling = folder, compiling
        self._deadline = deadline
        self.gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float16
        self.failures = 0
        self._generator = torch.Generator(device=device).manual_seed(0)

    @property
    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self._deadline - time.monotonic()

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normally distributed, new each time."""
        x = torch.randn(*shape, generator=self._generator, device=self.device)
        return x.to(dtype or self.dtype)

    def random_e4m3(self, *shape: int) -> torch.Tensor:
        return (self.random(*shape, dtype=torch.float32) * 64).to(torch.float8_e4m3fn)

    def line(self, text: str) -> None:
        print(f"   {text}", flush=True)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A part whose failure is told and counted, and ends nothing else."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            self.line(f"FAILED {what}: {type(error).__name__}: {error}")
            traceback.print_exc()

    @contextmanager
    def others(self, what: str) -> Iterator[None]:
        """A comparison: where it does not run, that is told and no failure of ours."""
        try:
            yield
        except Exception as error:
            self.line(f"{what} did not run: {type(error).__name__}: {error}")

    def check(self, what: str, good: bool, detail: str = "") -> None:
        self.failures += not good
        self.line(f"{'ok    ' if good else 'FAILED'} {what}{f': {detail}' if detail else ''}")

    def close(self, what: str, actual: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
        """||actual - exact|| over ||exact||, in float64; NaN never passes."""
        exact = exact.double()
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        self.check(what, error <= bound, f"{error:.1e}, at most {bound:.0e}")

    def same(
        self, what: str, actual: torch.Tensor, expected: torch.Tensor, but_for: float = 0.0
    ) -> None:
        """Bitwise, wherever they are; `but_for` is a share of the bytes that may differ."""
        actual, expected = (x.cpu().reshape(-1).view(torch.uint8) for x in (actual, expected))
        different = (actual != expected).sum().item()
        self.check(
            what,
            different <= but_for * actual.numel(),
            f"{different} of {actual.numel()} bytes differ",
        )

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call, the mean over all of them, back to back on the device.

        The calls run as one CUDA graph: what is measured is the device, not Python. The median of
        several replays, after some that are not counted.
        """
        if self.compiling:
            for call in calls:
                call()
            return 1.0
        if not self.gpu:
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
        graph.replay()
        times: list[float] = []
        while len(times) < 5 or sum(times) < MEASURE_S:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return sorted(times)[len(times) // 2] / len(calls)

    def copies(self, nbytes: int) -> int:
        """How many sets of inputs of this size to rotate among."""
        return max(1, min(64, COLD_BYTES // max(1, nbytes))) if self.gpu else 1

    def copy_rate(self) -> float:
        """Bytes a second of a large copy on the device, reads and writes counted."""
        size = 2**32 if self.gpu and not self.compiling else 2**20
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds([lambda: target.copy_(source)])
