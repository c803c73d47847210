"""A decode worker over a real socket that says what a test tells it to; a model folder to go with
it; and the gateway as a real process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from baton.cli.ports import any_free
from baton.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from common.rpc.loop import LoopThread
from common.rpc.server import RpcServer
from tests.support.mesh import ROOT, wait_until

SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
END = 0
VOCAB = 400
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ 'user' if m.role == 'user' else 'system' if m.role in "
    "['system', 'developer'] else 'assistant' }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A second on a machine that has nothing else to do.
START_S = 90
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
Behaviour = Callable[[worker_pb2.Submit], AsyncIterator[worker_pb2.TokenDelta]]


def make_model(folder: Path, *, template: bool = True, tokenizer: bool = True) -> Path:
    """A folder with config, byte-level tokenizer (special tokens are ids 0 to 3), template."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        train_tokenizer().save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the quick brown fox jumps over the lazy dog", "hello world, how are you today?"] * 50
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


class FakeDecode(worker_pb2_grpc.DecodeServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """`behaviour` is called for each Submit; what was submitted and cancelled is kept."""

    def __init__(self, behaviour: Behaviour, *, port: int = 0, fingerprint: bytes = b"f" * 16):
        self.behaviour = behaviour
        self.submits: list[worker_pb2.Submit] = []
        self.cancelled: list[str] = []
        self.sessions = 0
        self.state = worker_pb2.GetStateResponse(
            worker_id="fake",
            incarnation=os.urandom(8).hex(),
            role=worker_pb2.ROLE_DECODE,
            status=worker_pb2.WORKER_STATUS_READY,
            model=worker_pb2.ModelCard(
                name="fake",
                max_model_len=CONTEXT,
                block_size=16,
                fingerprint=fingerprint,
                vocab_size=VOCAB,
            ),
            load=worker_pb2.Load(
                max_waiting_requests=8,
                blocks_total=100,
                counters={"frames_dropped_corrupt": 2},
            ),
        )
        self._port = port
        self._thread = LoopThread("fake-decode")
        self._server: RpcServer | None = None
        self.port = self._thread.run(self._start()).result(10)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _start(self) -> int:
        self._server = server = RpcServer("127.0.0.1", self._port)
        server.add(
            self, worker_pb2_grpc.add_DecodeServiceServicer_to_server, "baton.v1.DecodeService"
        )
        server.add(
            self, worker_pb2_grpc.add_WorkerServiceServicer_to_server, "baton.v1.WorkerService"
        )
        return await server.start()

    def kill(self) -> None:
        """All connections break at once."""
        if self._server is not None:
            server, self._server = self._server, None
            self._thread.run(server.stop(0)).result(10)
            self._thread.close()

    async def GetState(self, request, context):
        return self.state

    async def GetTrace(self, request, context):
        span = worker_pb2.SpanRecord(trace_id=request.trace_id, span_id=b"12345678", name="fake")
        known = any(request.trace_id.hex() in s.traceparent for s in self.submits)
        return worker_pb2.GetTraceResponse(spans=[span] if known else [])

    async def Session(self, requests, context):
        self.sessions += 1
        out: asyncio.Queue = asyncio.Queue()
        await out.put(worker_pb2.SessionResponse(welcome=worker_pb2.Welcome(state=self.state)))
        tasks: dict[str, asyncio.Task] = {}
        reader = asyncio.create_task(self._read(requests, out, tasks))
        try:
            while True:
                yield await out.get()
        finally:
            for task in [reader, *tasks.values()]:
                task.cancel()

    async def _read(self, requests, out, tasks):
        with suppress(asyncio.CancelledError):
            async for message in requests:
                if message.HasField("submit"):
                    self.submits.append(message.submit)
                    tasks[message.submit.request_id] = asyncio.create_task(
                        self._answer(message.submit, out)
                    )
                elif message.HasField("cancel"):
                    self.cancelled.append(message.cancel.request_id)
                    tasks[message.cancel.request_id].cancel()

    async def _answer(self, submit, out):
        async for delta in self.behaviour(submit):
            delta.request_id = submit.request_id
            frame = worker_pb2.StepFrame(deltas=[delta])
            await out.put(worker_pb2.SessionResponse(frame=frame))


def say(ids: list[int], finish: int = STOP) -> Behaviour:
    """Each token in a delta of its own; the last one ends the sequence."""

    async def behaviour(submit):
        for index, token in enumerate(ids):
            last = index == len(ids) - 1
            yield worker_pb2.TokenDelta(
                token_ids=[token],
                finish_reason=finish if last else 0,
                cached_tokens=3 if index == 0 else None,
            )

    return behaviour


def say_then_hang(ids: list[int]) -> Behaviour:
    async def behaviour(submit):
        for token in ids:
            yield worker_pb2.TokenDelta(token_ids=[token])
        await asyncio.Event().wait()

    return behaviour


def fail(kind: int, message: str, after: list[int] | None = None) -> Behaviour:
    async def behaviour(submit):
        for token in after or []:
            yield worker_pb2.TokenDelta(token_ids=[token])
        yield worker_pb2.TokenDelta(
            finish_reason=common_pb2.FINISH_REASON_ERROR,
            error=common_pb2.Error(kind=kind, message=message),
        )

    return behaviour


class GatewayProcess:
    """`python -m services.gateway.main` with its log kept as lines."""

    def __init__(self, model: Path, decode: str, *flags: str, wait_ready: bool = True):
        self.http_port, self.grpc_port = any_free(), any_free()
        self.url = f"http://127.0.0.1:{self.http_port}"
        # Reading the CA bundle, which plain HTTP has no use for, costs more than all else here.
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False)
        command = [sys.executable, "-m", "services.gateway.main", "--exit-with-parent"]
        command += ["--announce-s=0"]  # no balancer is to notice its end
        command += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        command += ["--model", str(model), "--served-model-name", "m", "--decode", decode, *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        wait_until(self._alive if not wait_ready else self.ready, START_S, "gateway ready")

    def _read_log(self) -> None:
        self.log.extend(iter(self.process.stderr.readline, ""))

    def _alive(self) -> bool:
        return self._status("/health") == 200

    def ready(self) -> bool:
        return self._status("/ready") == 200

    def _status(self, path: str) -> int:
        if self.process.poll() is not None:
            raise AssertionError(f"gateway exited {self.process.returncode}: {self.log}")
        try:
            return self.client.get(path).status_code
        except httpx.HTTPError:
            return 0

    def state(self) -> dict:
        return self.client.get("/debug/state").json()

    def events(self, name: str) -> list[dict]:
        found = (json.loads(line) for line in list(self.log) if line.startswith("{"))
        return [event for event in found if event.get("event") == name]

    def stop(self, deadline_s: float = 20) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(deadline_s)
        self._reader.join(5)
        self.client.close()
        return code
