"""`baton serve ROLE ...`: run one service in this process. The containers' command."""

import argparse
import importlib

ROLES = ("gateway", "prefill", "decode", "kvstore")


def main(argv: list[str]) -> int:
    """What follows the role goes to that service's own main; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="baton serve",
        description="Run one service until SIGTERM. `baton serve ROLE --help` lists its flags.",
    )
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return importlib.import_module(f"services.{args.role}.main").main(args.rest)
