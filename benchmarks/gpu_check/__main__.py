"""Checks every kernel against its reference, then measures kernels and a whole model.

    make gpu-check                                  on a machine with a Hopper GPU, under 8 minutes
    python -m benchmarks.gpu_check --section gemm   one section
    python -m benchmarks.gpu_check --device cpu --tiny   runs this script's own lines without a GPU

Needs no network, no checkpoint and no installed Baton: what python3 has (torch, Triton, numpy,
safetensors, tokenizers, xxhash, tqdm, jinja2). Every part is a process of its own with a time
limit, so that one that fails or hangs leaves the others be; the exit status is then 1, and 2 where
there is no CUDA device.

The checks run side by side, and with them goes through all figures once, untimed, who compiles the
kernels for them: one after the other that alone would take minutes. Then come the figures, each
section with the machine for itself.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Section:
    """parts run side by side, each a module and its functions to call; limit_s is for all."""

    limit_s: int
    parts: tuple[str, ...]


SECTIONS = {
    "kernels": Section(
        165,
        (
            "kernels:encoding,quantization,norms,rotation,kv_writes",
            "kernels:products",
            "kernels:attention",
            "kernels:attention_e4m3_kv",
            "kernels:fp8_attention",
            "kernels:sampling,invariance,pages",
            "serving:invariance",
            "serving:decoding",
        ),
    ),
    "attention": Section(65, ("attention:run",)),
    "gemm": Section(40, ("gemm:run",)),
    "serving": Section(150, ("serving:run",)),
    "transformers": Section(55, ("peer:run",)),
}
CHECKS = "kernels"
# Sections that are about others: what they do has no say in the exit status.
PEERS = ("transformers",)
# Sections whose kernels are compiled while the checks run.
COMPILED = ("attention", "gemm", "serving")
NO_DEVICE = 2
# A dry run promises no time: its CPU may have much else to do.
DRY_RUN_PATIENCE = 4
# For a section by itself nobody has compiled anything.
LONE_PATIENCE = 2
# What the model of `serving` takes in a folder.
ROOM_BYTES = 16 * 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: figures mean nothing")
    parser.add_argument("--section", choices=SECTIONS, help="run only this one")
    for hidden in ("--part", "--folder", "--deadline", "--compile"):
        flag = {"action": "store_true"} if hidden == "--compile" else {}
        parser.add_argument(hidden, help=argparse.SUPPRESS, **flag)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device on this machine; nothing was checked")
        return NO_DEVICE
    if options.part:
        return run_part(options)
    # Whoever ends this ends what it has started, which is in sessions of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    describe(options.device, options.tiny)
    began = time.monotonic()
    names = [options.section] if options.section else list(SECTIONS)
    failed = [name for name in names if not run_section(name, names, options)]
    failed = [name for name in failed if name not in PEERS]
    print(f"\ngpu-check: {time.monotonic() - began:.0f} s; ", end="")
    print(f"failed: {', '.join(failed)}" if failed else f"{len(names)} sections, all right")
    return 1 if failed else 0


def describe(device: str, tiny: bool) -> None:
    """The machine, so that a saved output says where it is from."""
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: Triton's interpreter"
    print(f"{name}; torch {torch.__version__}, Triton {triton.__version__}", end="")
    print(f", Python {sys.version.split()[0]}")
    if tiny:
        print("--tiny: a dry run, its figures mean nothing")


class Process:
    """A part in a process and a folder of its own, which both end with it.

    told       its output goes straight to the screen; else it is printed when it has ended
    compiling  what would be timed is done once
    """

    def __init__(
        self,
        part: str,
        options: argparse.Namespace,
        limit_s: float,
        *,
        told: bool = False,
        compiling: bool = False,
    ) -> None:
        self.part, self.limit_s = part, limit_s
        # The same clock in every process.
        self.deadline = time.monotonic() + limit_s
        self.folder = tempfile.mkdtemp(prefix="baton-gpu-check-", dir=place())
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", part]
        command += ["--folder", self.folder, "--deadline", str(self.deadline)]
        command += ["--device", options.device]
        command += ["--tiny"] * options.tiny + ["--compile"] * compiling
        # Triton decides when a kernel is defined whether it is compiled or interpreted.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if options.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        to = {} if told else {"stdout": self.output, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **to)

    def end(self) -> bool:
        """Wait for it, and stop it where its time is over. Whether it ended well."""
        try:
            status = self.wait()
        finally:
            self.stop()
        self.output.seek(0)
        print(self.output.read(), end="")
        if status != 0:
            why = "not all right" if status else f"over its {self.limit_s:.0f} s: stopped"
            print(f"   {self.part}: {why}", flush=True)
        return status == 0

    def wait(self) -> int | None:
        """Its exit status; None: its time is over."""
        try:
            return self.process.wait(max(0.1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """With all that it has started: a compiler that hangs on would be in the way."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def place() -> str | None:
    """Memory if it has room for the weights, else the usual folder."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES else None


def run_section(name: str, names: list[str], options: argparse.Namespace) -> bool:
    """Whether the section ended well within its time."""
    print(f"\n== {name}", flush=True)
    section = SECTIONS[name]
    limit_s = section.limit_s * (1 if len(names) > 1 else LONE_PATIENCE)
    if options.device == "cpu":
        limit_s = section.limit_s * DRY_RUN_PATIENCE
    told = len(section.parts) == 1
    compiled = []
    running = [Process(part, options, limit_s, told=told) for part in section.parts]
    if name == CHECKS and options.device == "cuda":
        parts = [part for other in names if other in COMPILED for part in SECTIONS[other].parts]
        compiled = [Process(part, options, limit_s, compiling=True) for part in parts]
    try:
        ended = [process.end() for process in running]
        for process in compiled:  # what is wrong with it shows where it is timed
            if process.wait() is None:
                print(f"   kernels of {process.part} are not all compiled", flush=True)
    finally:
        for process in running + compiled:
            process.stop()
    return all(ended)


def run_part(options: argparse.Namespace) -> int:
    from benchmarks.gpu_check import absent

    absent.stand_in()
    from benchmarks.gpu_check.report import Report

    report = Report(
        torch.device(options.device), options.tiny, folder=Path(options.folder),
        deadline=float(options.deadline), compiling=options.compile,
    )  # fmt: skip
    module, functions = options.part.split(":")
    for function in functions.split(","):
        with report.guard(function):
            getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
