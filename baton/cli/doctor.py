"""`baton doctor`: what this machine lacks to run Baton, and what to do about it."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

from baton.cli import checks
from baton.cli.checks import Finding
from baton.cli.model_check import check_model

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def main(argv: list[str]) -> int:
    """Prints one line a check and a remedy below each problem; 1 when one of them is a failure."""
    args = _parser().parse_args(argv)
    findings = list(examine(args))
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            _show(finding)
    failed = sum(f.status == "fail" for f in findings)
    if not args.json:
        print(f"\n{failed} problem(s) to solve" if failed else "\nready: run `baton up`")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton doctor", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="PATH", help="model folder (default: BATON_MODEL, or the bundled one)")
    add("--port", type=int, default=8000, help="HTTP port that the gateway is to have")
    add("--grpc-port", type=int, default=9000, help="gRPC port that the gateway is to have")
    add("--json", action="store_true", help="for programs")
    return parser


def examine(args: argparse.Namespace) -> Iterable[Finding]:
    """All checks, in the order in which problems should be solved."""
    steps: tuple[Callable[[], Iterable[Finding]], ...] = (
        checks.check_python,
        checks.check_machine,
        checks.check_packages,
        checks.check_device,
        checks.check_transports,
        lambda: check_model(args.model),
        lambda: checks.check_ports(args.port, args.grpc_port),
    )
    for step in steps:
        yield from step()


def _show(finding: Finding) -> None:
    print(f"{MARKS[finding.status]}  {finding.name:<22} {finding.message}")
    if finding.remedy:
        print(f"      {'':<22} remedy: {finding.remedy}")
