"""`baton bench`: the speed of a running endpoint, or of a model in this process."""

import argparse
import importlib
import runpy
import sys

from baton.cli.locate import checkout
from common.errors import ConfigError

# name: one line of help
BENCHMARKS = {
    "serve": "a running endpoint: throughput, TTFT and ITL (needs a checkout of the sources)",
    "throughput": "many prompts at once, in this process: requests/s and tokens/s",
    "latency": "one batch at a time, in this process: seconds, tokens/s and weight bytes/s",
}


def main(argv: list[str]) -> int:
    """Run one benchmark with the arguments behind its name; returns its exit code."""
    args = _parser().parse_args(argv)
    if args.benchmark == "serve":
        return _serve(args.rest)
    # Loads torch: only where it is needed.
    return int(
        getattr(importlib.import_module("baton.cli.bench_offline"), args.benchmark)(args.rest)
    )


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, BENCHMARKS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="baton bench",
        description="Measure speed.",
        epilog=f"benchmarks:\n{table}\n\n`baton bench BENCHMARK --help` says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _serve(argv: list[str]) -> int:
    """Run benchmarks/serving.py. Raises ConfigError outside a checkout."""
    script = checkout() / "benchmarks" / "serving.py"
    if not script.is_file():
        raise ConfigError(f"{script} does not exist; benchmarks need a checkout of the sources")
    sys.argv = ["baton bench serve", *argv]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):  # as the interpreter does at the end of a script
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
