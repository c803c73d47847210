"""Is a service Ready? `python -m common.rpc.probe host:port` or `... http://host:port/ready`.

The containers' health check: exit code 0 when the gRPC health service says SERVING, or the URL
answers 200; else 1 with the reason on stderr.
"""

import argparse
import http.client
import sys
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEFAULT_TIMEOUT_S = 3.0


def probe(target: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> str | None:
    """None when `target` (host:port or an http URL) is Ready, else the reason that it is not."""
    if target.startswith(("http://", "https://")):
        return _probe_http(target, timeout_s)
    return _probe_grpc(target, timeout_s)


def _probe_http(url: str, timeout_s: float) -> str | None:
    # A proxy of the environment must not answer for a service on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            return None if answer.status == 200 else f"{url}: HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url}: HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {error}"


def _probe_grpc(address: str, timeout_s: float) -> str | None:
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(address, options=options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m common.rpc.probe", description=__doc__)
    parser.add_argument("target", help="host:port of a gRPC service, or an http URL")
    parser.add_argument("--timeout-s", type=float, default=DEFAULT_TIMEOUT_S)
    args = parser.parse_args(argv)
    reason = probe(args.target, args.timeout_s)
    if reason is not None:
        print(reason, file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
