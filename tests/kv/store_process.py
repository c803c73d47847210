"""A kvstore as a real process."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc

from baton.v1 import kvstore_pb2, kvstore_pb2_grpc
from tests.kv.support import until

ROOT = Path(__file__).resolve().parents[2]


class StoreProcess:
    """Started on construction, Ready when that returns."""

    def __init__(self, *flags: str, host: str = "127.0.0.1", port: int = 0):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.kvstore.main", "--host", host),
                *("--port", str(port), "--exit-with-parent", *flags),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = until(self._ready_port, 20)
        self.address = f"{host}:{self.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = kvstore_pb2_grpc.KVStoreServiceStub(self.channel)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def _ready_port(self):
        for line in self.lines:
            if '"ready"' in line:
                return json.loads(line)["port"]
        assert self.process.poll() is None, "".join(self.lines)
        return None

    def put(self, *frames: bytes) -> kvstore_pb2.PutBlocksResponse:
        requests = (kvstore_pb2.PutBlocksRequest(frame=frame) for frame in frames)
        return self.stub.PutBlocks(requests, timeout=10)

    def lookup(self, *keys: bytes) -> int:
        return self.stub.LookupBlocks(
            kvstore_pb2.LookupBlocksRequest(keys=keys), timeout=10
        ).matched

    def get(self, *keys: bytes) -> list[bytes]:
        responses = self.stub.GetBlocks(kvstore_pb2.GetBlocksRequest(keys=keys), timeout=10)
        return [response.frame for response in responses]

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()
        self.channel.close()
        self._reader.join(5)
        self.process.stderr.close()
