"""Compiled once, kept on disk, run by the threads that torch computes with.

A kernel is a C function of one address, that of its arguments; every thread of a team calls it,
and takes work items from a shared counter until none is left. The team is the OpenMP runtime's
that torch brings: a second pool would fight with the first for the cores, since idle OpenMP
threads spin for a while.
"""

import ctypes
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import numba
import numpy as np
import structlog
import torch
from numba import cfunc, types
from numba.core import config

from common.engine.kernels.cpu.simd import BFLOAT16, E4M3, FLOAT32

log = structlog.get_logger("kernels")

# Brings a recorded kernel's arguments up to date, from a step's batch and what was prepared of it.
Refresh = Callable[[Any, Any, Any], None]

# Smaller work is done sooner than a second thread has begun it.
ELEMENTS_PER_THREAD = 16384

LINE_BYTES = 64
# Of lines that lie a multiple of this apart a core's first cache keeps a few dozen at most.
PERIOD = 2048

KIND = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float8_e4m3fn: E4M3}


def fields(names: str) -> tuple[tuple[str, type], ...]:
    """The fields of a kernel's arguments: whole numbers of these names, after what all begin with:
    the work items handed out so far, the threads that have come, the work items."""
    counters = ("next_item", "next_thread", "num_items")
    return tuple((name, ctypes.c_int64) for name in (*counters, *names.split()))


def _cache_folder() -> Path:
    """A folder of the user's own, for these sources, this Numba and this Python.

    Numba itself tells CPUs apart, but notices a change only in the file of a kernel, not in those
    it uses. Others must not write there: what lies in it is run.
    """
    digest = blake2b(digest_size=8)
    for part in (numba.__version__, llvmlite.__version__, platform.python_version()):
        digest.update(part.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    homes = [Path(os.path.expanduser("~")) / ".cache", Path(tempfile.gettempdir())]
    if os.path.isabs(xdg := os.environ.get("XDG_CACHE_HOME", "")):
        homes.insert(0, Path(xdg))
    for home in homes:
        folder = home / f"baton-{os.getuid()}" / f"kernels-{digest.hexdigest()}"
        reason = _trouble(folder)
        if reason is None:
            return folder
        log.warning("kernel_cache_refused", folder=str(folder), reason=reason)
    log.warning("no_kernel_cache", tried=[str(home) for home in homes])
    return Path(tempfile.mkdtemp(prefix="baton-kernels-"))


def _trouble(folder: Path) -> str | None:
    """Why this folder, made if it is not there, is no place for kernels; None: it is one."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.parent.stat()
    except OSError as error:
        return str(error)
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        return f"others may write to {folder.parent}; make it this user's own, with mode 0700"
    return None if os.access(folder, os.W_OK) else "this user may not write there"


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch loaded, with GOMP_parallel(function, argument, threads, flags):
    GCC's, or Intel's, which has it too; None where there is none."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*")]
    for name in (None, *map(str, found)):
        try:
            library = ctypes.CDLL(name)
            function = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return library
    return None


_FOLDER = _cache_folder()
_runtime = _openmp()
# What the threads of a team call: how many they are, and the system.
TEAM_SIZE = _runtime and ctypes.cast(_runtime.omp_get_num_threads, ctypes.c_void_p).value
SYSTEM_CALL = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value
_letting_go = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_holding = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Recorder(Protocol):
    """Takes note of kernels in place of their being run, and gives them memory; see tape.py."""

    def add(
        self,
        kernel: "Kernel",
        arguments: ctypes.Structure,
        items: int,
        refresh: Refresh | None,
    ) -> None: ...

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor: ...

    def keep(self, held: object) -> None: ...


class _Recording(threading.local):
    """Who takes note of this thread's kernels; None: they are run."""

    recorder: Recorder | None = None


recording = _Recording()


def empty(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width], for what a kernel computes."""
    if recording.recorder is not None:
        return recording.recorder.empty(rows, width, dtype)
    return torch.empty(rows, width, dtype=dtype)


def spread(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The same for what a product reads, some rows side by side. Rows a multiple of PERIOD apart
    would push each other out of the first cache, so these lie a line further apart: the result is
    not contiguous then."""
    apart = LINE_BYTES // dtype.itemsize if width * dtype.itemsize % PERIOD == 0 else 0
    return empty(rows, width + apart, dtype)[:, :width]


def threads_for(elements: int) -> int:
    """Threads worth waking for element-wise work of this size."""
    return min(torch.get_num_threads(), 1 + elements // ELEMENTS_PER_THREAD)


class Kernel:
    """A compiled function of its arguments, a ctypes structure of `fields`."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled  # keeps the machine code alive
        self.address = compiled.address
        self._freely = _letting_go(compiled.address)
        self._alone = _holding(compiled.address)

    def run(
        self,
        arguments: ctypes.Structure,
        items: int,
        threads: int,
        *,
        long: bool = True,
        refresh: Refresh | None = None,
    ) -> None:
        """Does all work items on up to `threads` threads. Not `long`: so quickly that Python's
        other threads need not run meanwhile; the interpreter's lock is then kept, since it is not
        had again at once where they want it. `refresh` is what a recorder calls in later steps."""
        if recording.recorder is not None:
            recording.recorder.add(self, arguments, items, refresh)
            return
        arguments.num_items = items
        arguments.next_item = arguments.next_thread = 0
        if threads > 1 and items > 1 and _runtime is not None:
            self.run_team(arguments, min(threads, items))
        elif long:
            self._freely(ctypes.addressof(arguments))
        else:
            self._alone(ctypes.addressof(arguments))

    def run_team(self, arguments: ctypes.Structure, threads: int) -> None:
        """Calls the kernel on each of so many threads, where there is a runtime for that."""
        _runtime.GOMP_parallel(self.address, ctypes.addressof(arguments), threads, 0)


def compile_kernel(function: Callable[[Any], None], arguments: type[ctypes.Structure]) -> Kernel:
    """Compiles, or finds compiled, a function of the address of such arguments."""
    config.CACHE_DIR = str(_FOLDER)
    record = numba.from_dtype(np.dtype(arguments))
    signature = types.void(types.CPointer(record))
    return Kernel(cfunc(signature, cache=True, error_model="numpy")(function))
