"""Checks every kernel against its reference, then measures kernels and a whole model.

    make gpu-check                                  on a machine with a Hopper GPU, under 8 minutes
    python -m benchmarks.gpu_check --section gemm   one section
    python -m benchmarks.gpu_check --device cpu --tiny   runs this script's own lines without a GPU

Needs no network, no checkpoint and no installed Baton: what python3 has (torch, Triton, numpy,
safetensors, tokenizers, xxhash, tqdm, jinja2). Each section is a process of its own with a time
limit, so that one that fails or hangs leaves the others be; the exit status is then 1, and 2
where there is no CUDA device.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time

import torch

# name -> module, seconds it may take. The sum is what the whole may: under 8 minutes.
SECTIONS = {
    "kernels": ("benchmarks.gpu_check.kernels", 160),
    "attention": ("benchmarks.gpu_check.attention", 70),
    "gemm": ("benchmarks.gpu_check.gemm", 40),
    "serving": ("benchmarks.gpu_check.serving", 150),
    "transformers": ("benchmarks.gpu_check.peer", 55),
}
# Sections that are about others: what they do has no say in the exit status.
PEERS = ("transformers",)
NO_DEVICE = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: figures mean nothing")
    parser.add_argument("--section", choices=SECTIONS, help="run only this one")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device on this machine; nothing was checked")
        return NO_DEVICE
    if options.here:
        return run_section(options.section, options.device, options.tiny)
    describe(options.device, options.tiny)
    began = time.monotonic()
    names = [options.section] if options.section else list(SECTIONS)
    ended = {name: in_process(name, options.device, options.tiny) for name in names}
    failed = [name for name, good in ended.items() if not good and name not in PEERS]
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


def in_process(name: str, device: str, tiny: bool) -> bool:
    """Whether the section ended well within its time."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--here", "--section", name]
    command += ["--device", device, *(["--tiny"] if tiny else [])]
    # Triton decides when a kernel is defined whether it is compiled or interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    try:
        # A dry run promises no time: its CPU may have much else to do.
        limit = SECTIONS[name][1] * (1 if device == "cuda" else 4)
        return subprocess.run(command, env=environment, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"   over its {limit} s: stopped", flush=True)
        return False


def run_section(name: str, device: str, tiny: bool) -> int:
    from benchmarks.gpu_check import absent

    absent.stand_in()
    from benchmarks.gpu_check.report import Report

    report = Report(torch.device(device), tiny)
    importlib.import_module(SECTIONS[name][0]).run(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
