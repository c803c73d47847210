"""GB/s and latency of the data plane by transport and size, beside memcpy and a raw socket.

    python benchmarks/transfer.py --transports shm,tcp --sizes 64KiB,2MiB,64MiB,1GiB --rounds 5

Two processes, as a prefill and a decode worker on one machine: the sender has the bytes in its
memory, the receiver ends with them in its own. Frames have the headers of a handoff and are
`--frame` bytes, a block; a transfer of more is many frames in flight. Both sides compute the
checksums, as the workers do, unless the column says `bare`; the receiver copies every frame to its
page. memcpy is one thread of numpy over the same bytes; the raw socket is two plain loops of
sendall and recv_into over loopback, without checksums. ucx_perftest (frames of the same size, one
buffer, polling) runs where UCX is installed.
Each process has a core of its own, where there are two. UCX takes what it finds (UCX_TLS=tcp,self
for its TCP).

All sides alternate within a round, so that they see the same machine; a figure is the median of the
rounds. Sizes over a quarter of the free memory are left out.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import uvloop
from pydantic import ByteSize, TypeAdapter

from baton.cli.ports import any_free
from common.kv.transports import DEFAULT_NAMES, SIDE_TRANSPORTS, DataPlane, Link, parse_names
from common.kv.wire import (
    FRAME_OVERHEAD_BYTES,
    BlockRange,
    Envelope,
    decode_handoff_frame,
    encode_block_header,
    encode_envelope,
)
from common.telemetry import logging

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))
GB = 1e9
RANGE = BlockRange(0, 8, 0, 32)
BARE_HEADER = bytes(FRAME_OVERHEAD_BYTES)
# A side is run this many times a round for small sizes, and at least once.
REPEAT_BYTES = 256 * 2**20
MOST_REPEATS = 200


# The receiver's process -------------------------------------------------------------------


async def receive(names: tuple[str, ...], size: int, frame_bytes: int) -> None:
    """Print the two ports; then serve until the input ends."""
    _stay_on_core(-1)
    pages = np.zeros(size, np.uint8)

    async def on_frame(frame: memoryview) -> int:
        if frame[0]:
            envelope, block = decode_handoff_frame(frame)
            payload, start = block.payload, envelope.first_block * frame_bytes
        else:
            payload = frame[FRAME_OVERHEAD_BYTES:]
            start = int.from_bytes(frame[1:5], "little") * frame_bytes
        np.copyto(pages[start : start + len(payload)], np.frombuffer(payload, np.uint8))
        return 0

    plane = DataPlane(names)
    port = await plane.listen("127.0.0.1", 0, on_frame)
    raw = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_receive_raw, args=(raw, memoryview(pages)), daemon=True).start()
    print(json.dumps([port, raw.getsockname()[1]]), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await plane.close()


def _receive_raw(listener: socket.socket, pages: memoryview) -> None:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while head := sock.recv(8, socket.MSG_WAITALL):
        view = pages[: int.from_bytes(head, "little")]
        while view:
            view = view[sock.recv_into(view) :]
        sock.sendall(b"k")


@contextmanager
def receiver(names: tuple[str, ...], size: int, frame_bytes: int) -> Iterator[list[int]]:
    """The ports of a receiver's process."""
    command = [sys.executable, __file__, "--receive", "--transports", ",".join(names)]
    command += ["--sizes", str(size), "--frame", str(frame_bytes)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        process.wait(10)
    finally:
        process.kill()
        process.wait()


# Sides: each moves `size` bytes once ---------------------------------------------------------

Side = Callable[[int], Awaitable[None]]


def over(link: Link, source: memoryview, frame_bytes: int, *, checksums: bool) -> Side:
    """By a transport's link, in frames of a handoff."""

    def header(index: int, payload: memoryview) -> bytes:
        if not checksums:
            return b"\0" + index.to_bytes(4, "little") + BARE_HEADER[5:]
        envelope = Envelope(
            bytes(16), bytes(16), 1, number=index, first_block=index, num_blocks=1, total=index + 1
        )
        block = encode_block_header(bytes(16), RANGE, 16, payload)
        return encode_envelope(envelope) + block

    async def run(size: int) -> None:
        answers = []
        for index, start in enumerate(range(0, size, frame_bytes)):
            payload = source[start : min(start + frame_bytes, size)]
            answers.append(await link.send(header(index, payload), payload))
        await asyncio.gather(*answers)

    return run


def raw_socket(port: int, source: memoryview) -> Side:
    """One plain TCP connection over loopback."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(size: int) -> None:
        sock.sendall(size.to_bytes(8, "little"))
        sock.sendall(source[:size])
        sock.recv(1)

    return run


def memcpy(source: memoryview) -> Side:
    """One thread, in this process."""
    bytes_in = np.frombuffer(source, np.uint8)
    bytes_out = np.ones_like(bytes_in)

    async def run(size: int) -> None:
        np.copyto(bytes_out[:size], bytes_in[:size])

    return run


# Measuring ----------------------------------------------------------------------------------


async def measure(sides: dict[str, Side], size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a transfer, by side, one figure a round: the median of a round's repeats."""
    repeats = max(1, min(MOST_REPEATS, REPEAT_BYTES // size))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        await side(size)
    for number in range(rounds):
        # Each round begins with another side.
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in order:
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                await sides[name](size)
                times.append(time.perf_counter() - started)
            seconds[name].append(statistics.median(times))
    return seconds


def find_perftest() -> tuple[str, dict[str, str]] | None:
    """UCX's own benchmark and the environment it needs: on PATH, or in the wheel of UCX."""
    if found := shutil.which("ucx_perftest"):
        return found, dict(os.environ)
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (program := Path(folder) / "bin" / "ucx_perftest").exists():
            libraries = {"LD_LIBRARY_PATH": str(Path(folder) / "lib")}
            return str(program), {**os.environ, **libraries, "UCX_WARN_UNUSED_ENV_VARS": "n"}
    return None


def ucx_perftest(size: int) -> float | None:
    """Seconds for `size` bytes in one message by UCX's own benchmark; None without it."""
    found = find_perftest()
    if found is None:
        return None
    program, environ = found
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    port = any_free()
    server = subprocess.Popen([program, "-p", str(port)], env=environ, **quiet)
    os.sched_setaffinity(server.pid, {CORES[-1]})
    time.sleep(0.5)  # it has no sign of being ready
    count = max(4, 2**30 // size)
    command = [program, "127.0.0.1", "-p", str(port), "-t", "tag_bw", "-s", str(size)]
    try:
        done = subprocess.run(
            [*command, "-n", str(count), "-w", "4", "-f"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        print(f"ucx_perftest failed: {error}", file=sys.stderr)
        return None
    finally:
        server.kill()
        server.wait()
    # The last line ends in bandwidth (MB/s, average and overall) and message rate, likewise.
    return size / (float(done.stdout.split()[-3]) * 2**20)


def show(size: int, seconds: dict[str, list[float]]) -> None:
    """One table."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{ByteSize(size).human_readable()}")
    print(f"{'':<14}{'GB/s':>8}{'min':>8}{'max':>8}{'ms':>10}{'/memcpy':>9}{'/raw':>7}")
    for name, times in seconds.items():
        rates = sorted(size / t / GB for t in times)
        print(
            f"{name:<14}{size / median[name] / GB:>8.2f}{rates[0]:>8.2f}{rates[-1]:>8.2f}"
            f"{median[name] * 1e3:>10.3f}{median['memcpy'] / median[name]:>9.2f}"
            f"{median['raw socket'] / median[name]:>7.2f}"
        )


async def run(args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """All seconds of all rounds, by size and side."""
    largest = max(args.sizes)
    source = memoryview(np.random.default_rng(1).integers(0, 256, largest, np.uint8)).cast("B")
    with receiver(args.transports, largest, args.frame) as (port, raw_port):
        _stay_on_core(0)
        sides: dict[str, Side] = {
            "memcpy": memcpy(source),
            "raw socket": raw_socket(raw_port, source),
        }
        planes = [DataPlane([name]) for name in args.transports]
        for name, plane in zip(args.transports, planes, strict=True):
            link = await plane.connect(f"127.0.0.1:{port}")
            sides[name] = over(link, source, args.frame, checksums=True)
            sides[f"{name} bare"] = over(link, source, args.frame, checksums=False)
        print(f"frames of {ByteSize(args.frame).human_readable()}, {args.rounds} rounds")
        results = {}
        for size in args.sizes:
            results[size] = await measure(sides, size, args.rounds)
            message = min(size, args.frame)
            if "ucx" in args.transports and (perftest := ucx_perftest(message)) is not None:
                results[size]["ucx_perftest"] = [perftest * size / message]
            show(size, results[size])
        for plane in planes:
            await plane.close()
        return results


def _stay_on_core(index: int) -> None:
    """Without this the system may run both ends in turns on one core, or move them about."""
    if len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[index]})


def usable() -> tuple[str, ...]:
    """The transports of this machine, without nixl, which cannot be in a process with ucx."""
    return tuple(
        n for n in DEFAULT_NAMES if n not in SIDE_TRANSPORTS or SIDE_TRANSPORTS[n][1]() is None
    )


def _sizes(text: str) -> list[int]:
    return [int(TypeAdapter(ByteSize).validate_python(part)) for part in text.split(",")]


def _fit(sizes: list[int]) -> list[int]:
    """The sizes that fit: three copies of the largest are in memory at once."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    fitting = [size for size in sizes if size <= free // 4]
    if left := len(sizes) - len(fitting):
        print(f"{left} size(s) left out: {free / GB:.1f} GB of memory are free", file=sys.stderr)
    return fitting


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--transports", type=parse_names, default=usable(), help="for example shm,tcp")
    add("--sizes", type=_sizes, default="64KiB,2MiB,16MiB,64MiB,256MiB,1GiB", help="of a transfer")
    add("--frame", type=lambda text: _sizes(text)[0], default="2MiB", help="bytes of a block")
    add("--rounds", type=int, default=5)
    add("--json", metavar="FILE", help="write all seconds of all rounds there")
    add("--receive", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.setup("transfer", "warning")
    if args.receive:
        uvloop.run(receive(args.transports, args.sizes[0], args.frame))
    else:
        args.sizes = _fit(args.sizes)
        results = uvloop.run(run(args))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
