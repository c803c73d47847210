"""Generate baton/v1/*_pb2*.py from protos/baton/v1; with --check, fail when they are stale."""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def generate(out: Path) -> None:
    """Write the stubs of every proto under `out`. Raises SystemExit when protoc fails."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    command = ["protoc", f"-I{PROTOS}", *(f"--{k}={out}" for k in OUTPUTS), *sources]
    if code := protoc.main(command):
        raise SystemExit(code)


OUTPUTS = ("python_out", "pyi_out", "grpc_python_out")


def stale() -> list[str]:
    """Names of committed stubs that differ from what the protos give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {p.name: p.read_bytes() for p in Path(folder, "baton/v1").glob("*_pb2*.py*")}
    held = {p.name: p.read_bytes() for p in (ROOT / "baton/v1").glob("*_pb2*.py*")}
    return sorted(n for n in fresh.keys() | held.keys() if fresh.get(n) != held.get(n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
    elif names := stale():
        sys.exit(f"stale stubs: {', '.join(names)}; run `make protos` and commit the result")


if __name__ == "__main__":
    main()
