"""Workers as real processes, and a gateway's side of a session."""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import grpc
import torch

from baton.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from common.rpc.channel import connect
from tests.engine.zoo import expected_logits

ROOT = Path(__file__).resolve().parents[2]
START_S = 120


class Worker:
    """A prefill or decode worker. Its log is a file of JSON lines."""

    def __init__(self, role, model, folder, *flags):
        self.role = role
        self.log = Path(folder) / f"{role}-{secrets.token_hex(3)}.log"
        command = [sys.executable, "-m", f"services.{role}.main", "--port", "0"]
        if role != "kvstore":
            command += ["--model", str(model), "--threads", "1"]
        command += ["--exit-with-parent", *flags]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.address = ""

    def text(self):
        return self.log.read_text(errors="replace")

    def events(self, name):
        found = []
        for line in self.text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                event = json.loads(line)
                if event["event"] == name:
                    found.append(event)
        return found

    def ready(self):
        """Blocks until it is."""
        end = time.monotonic() + START_S
        while not (events := self.events("ready")):
            if self.process.poll() is not None:
                raise AssertionError(f"{self.role} exited {self.process.returncode}: {self.text()}")
            if time.monotonic() > end:
                raise AssertionError(f"{self.role} not ready in {START_S} s: {self.text()}")
            time.sleep(0.02)  # the log does not tell when it grows
        self.address = f"127.0.0.1:{events[0]['port']}"
        return self

    async def state(self):
        async with connect(self.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            return await stub.GetState(worker_pb2.GetStateRequest(), timeout=5)

    async def spans(self, trace_id):
        async with connect(self.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            request = worker_pb2.GetTraceRequest(trace_id=trace_id)
            return list((await stub.GetTrace(request, timeout=5)).spans)

    async def idle(self, deadline_s=1.0):
        """The state once nothing is held; AssertionError after the deadline."""

        async def check():
            state = await self.state()
            return state if is_idle(state.load) else None

        try:
            return await until(check, f"{self.role} idle", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; {(await self.state()).load}") from None

    def stop(self, kill=False):
        if self.process.poll() is None:
            self.process.kill() if kill else self.process.terminate()
        return self.process.wait(20)


def is_greedy(model, prompt, tokens, count):
    """Whether these are the `count` tokens that transformers finds likeliest, each given those
    before it. One forward pass over all of them; a tie within rounding may go either way."""
    logits = expected_logits(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return len(tokens) == count and bool((logits.amax(1) - chosen < 1e-3).all())


def new_trace():
    """A trace id, and the traceparent of a span of it."""
    trace_id = secrets.token_bytes(16)
    return trace_id, f"00-{trace_id.hex()}-00f067aa0ba902b7-01"


def is_idle(load):
    held = (load.running_requests, load.waiting_requests, load.blocks_used)
    return not any((*held, load.open_handoffs, load.open_leases, load.tokens_waiting))


async def until(condition, what, deadline_s=10.0):
    """The first true answer of a function, plain or async."""
    end = time.monotonic() + deadline_s
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s} s")
        await asyncio.sleep(0.01)  # other processes do not tell when it holds


class Reply:
    """What came back for one request."""

    def __init__(self):
        self.tokens = []
        self.finish = common_pb2.FINISH_REASON_UNSPECIFIED
        self.error = None
        self.cached = None
        self.done = asyncio.Event()
        self.changed = asyncio.Event()

    def add(self, delta):
        self.tokens += delta.token_ids
        if delta.HasField("cached_tokens"):
            assert self.cached is None, "cached_tokens comes once"
            self.cached = delta.cached_tokens
        if delta.HasField("error"):
            self.error = delta.error
        self.changed.set()
        if delta.finish_reason:
            assert not self.done.is_set(), "finish_reason comes once"
            self.finish = delta.finish_reason
            self.done.set()

    async def end(self, timeout_s=30):
        await asyncio.wait_for(self.done.wait(), timeout_s)
        return self

    async def has_tokens(self, count, timeout_s=30):
        async def wait():
            while len(self.tokens) < count:
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), timeout_s)
        return self


class GatewaySession:
    """One Session stream."""

    def __init__(self, address):
        self.channel = connect(address)
        self.call = worker_pb2_grpc.DecodeServiceStub(self.channel).Session()
        self.replies = {}
        self.welcome = None
        self.frames = 0
        self.ended = None

    async def __aenter__(self):
        await self.send(hello=worker_pb2.Hello(gateway_id="test"))
        self.welcome = (await asyncio.wait_for(self.call.read(), 10)).welcome
        self.reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exc):
        self.reader.cancel()
        self.call.cancel()
        await self.channel.close()

    async def send(self, **message):
        await self.call.write(worker_pb2.SessionRequest(**message))

    async def _read(self):
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (message := await self.call.read()) is not grpc.aio.EOF:
                self.frames += 1
                for delta in message.frame.deltas:
                    self.replies[delta.request_id].add(delta)
        self.ended = True

    async def submit(self, tokens, *, request_id=None, candidates=(), remaining_ms=60_000, **extra):
        request_id = request_id or secrets.token_hex(4)
        reply = self.replies.setdefault(request_id, Reply())
        reply.id = request_id
        trace = {k: extra.pop(k) for k in ("traceparent", "tenant") if k in extra}
        sampling = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **extra}
        submit = worker_pb2.Submit(
            request_id=request_id,
            token_ids=tokens,
            sampling=common_pb2.SamplingParams(**sampling),
            remaining_ms=remaining_ms,
            prefill_candidates=candidates,
            **trace,
        )
        await self.send(submit=submit)
        return reply

    async def cancel(self, request_id):
        await self.send(cancel=worker_pb2.Cancel(request_id=request_id))
