"""Compiles every Triton kernel for sm_90 (Hopper), without a GPU: python -m tools.aot

Prints registers, spilled bytes and shared memory of each; exits with 1 where one spills more than
its case allows or does not compile. Needs Triton (the `triton` extra), and TRITON_INTERPRET unset.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from tools import aot_cases

TARGET = GPUTarget("cuda", 90, 32)
# What one thread block may have on sm_90, and one thread.
MAX_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True)
class AotCase:
    """One kernel with one set of arguments.

    args         by parameter name: a pointer as its type ("*fp16"), taken to be aligned to 16
                 bytes as torch's allocations are, a descriptor as its type
                 ("tensordesc<fp16[64, 64]>"); anything else as an example value
    options      num_warps, num_stages and what else the launcher passes
    spill_bytes  spilled stores and loads that are known and accepted, with the reason beside it
    """

    name: str
    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    spill_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one thread (registers, spill_bytes) and of one thread block (shared_bytes)."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int


def source(case: AotCase) -> ASTSource:
    """The kernel specialized as Triton's launcher would: integers equal to 1 are constants,
    pointers and integers divisible by 16 are marked so."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(case.kernel.params):
        value = case.args[parameter.name]
        special = not parameter.do_not_specialize
        divisible = isinstance(value, str) and value.startswith("*")
        divisible = divisible and not parameter.do_not_specialize_on_alignment
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, str):
            signature[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = special and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, attributes)


def compile_case(case: AotCase) -> CompiledKernel:
    return triton.compile(source(case), target=TARGET, options=case.options)


def usage(compiled: CompiledKernel) -> Usage:
    """Read from the assembler's own report, and the shared memory from Triton's."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", f"{ptx}.o"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas -v reports no registers or no spills:\n{report}")
    return Usage(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, spills)),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def cases() -> Iterator[AotCase]:
    """The `CASES` of every module in tools/aot_cases."""
    for module in pkgutil.iter_modules(aot_cases.__path__):
        yield from importlib.import_module(f"tools.aot_cases.{module.name}").CASES


def check(case: AotCase) -> tuple[str, bool]:
    """A line of the table, and whether the case is as expected."""
    try:
        used = usage(compile_case(case))
    except Exception as error:  # whatever the compiler raises is this line's result
        return f"{case.name:44} does not compile: {innermost(error)}", False
    good = used.spill_bytes <= case.spill_bytes and used.shared_bytes <= MAX_SHARED_BYTES
    line = (
        f"{case.name:44} {used.registers:9} {used.spill_bytes:11} {used.shared_bytes:12} "
        f"{used.warps:5}"
    )
    return line if good else f"{line}  over the limit", good


def innermost(error: BaseException) -> str:
    """The last of an error's causes: Triton wraps one for each function that calls another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[-300:]}"


def check_named(name: str) -> tuple[str, bool]:
    return check(next(case for case in cases() if case.name == name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filter", nargs="?", default="", help="only cases with this in their name")
    chosen = [case.name for case in cases() if parser.parse_args().filter in case.name]
    print(f"Triton {triton.__version__}, sm_90")
    print(f"{'kernel':44} registers spill bytes shared bytes warps")
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line, good in pool.map(check_named, chosen):
            failed += not good
            print(line, flush=True)
    print(f"{len(chosen)} kernels, {failed} failed")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
