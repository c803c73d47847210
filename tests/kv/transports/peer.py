"""A peer process: `receive NAME` prints where it listens, then each frame's size and checksum;
`send NAME WHERE FRAMES BYTES` sends random frames and prints "sending" after the first answer."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import xxhash

from common.kv.transports import DataPlane
from common.kv.transports.shm import ShmTransport
from tests.kv.transports.support import End


async def receive(name: str, where: str = "") -> None:
    """`where`: the folder of shm, the port of the data plane ("plane"). Frames that begin with
    "hold" are answered never."""

    async def on_frame(frame: memoryview) -> int:
        print(len(frame), xxhash.xxh3_64_hexdigest(frame), flush=True)
        if bytes(frame[:4]) == b"hold":
            await asyncio.Event().wait()
        return 0

    if name == "plane":
        plane = DataPlane()
        told: object = f"127.0.0.1:{await plane.listen('127.0.0.1', int(where or 0), on_frame)}"
        close = plane.close
    else:
        end = End(name, ShmTransport(Path(where)) if where else None)
        told, close = await end.listen(on_frame), end.close
    print(json.dumps(told), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await close()


async def send(name: str, where: str, frames: str, size: str) -> None:
    end = End(name)
    link = await end.open(json.loads(where))
    payload = os.urandom(int(size))
    for number in range(int(frames)):
        answer = await link.send(number.to_bytes(4, "big"), payload)
        if number == 0:
            await answer
            print("sending", flush=True)
    await answer
    print("sent", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await end.close()


async def idle(name: str, seconds: str) -> None:
    """A receiver and a sender with a live link between them, and what they burn: CPU seconds."""
    receiver, sender = End(name), End(name)

    async def on_frame(frame: memoryview) -> int:
        return 0

    link = await sender.open(await receiver.listen(on_frame))
    await link.probe()
    before = time.process_time()
    await asyncio.sleep(float(seconds))  # the time that is measured
    print(time.process_time() - before, flush=True)
    await sender.close()
    await receiver.close()


if __name__ == "__main__":
    asyncio.run({"receive": receive, "send": send, "idle": idle}[sys.argv[1]](*sys.argv[2:]))
