"""`python -m baton.conformance name[:argument]`: each check of a connector, one line each."""

import argparse
import importlib
import sys
from collections.abc import Callable

import structlog

from baton.conformance.checks import CHECKS, Subject
from common.errors import BatonError
from common.kv.connectors.registry import ConnectorContext, make_connector, parse_connectors
from common.rpc.loop import LoopThread


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m baton.conformance", description=__doc__)
    parser.add_argument("connector", help="as in --kv-connectors, for example folder:/tmp/kv")
    parser.add_argument(
        "--spoil",
        metavar="MODULE:FUNCTION",
        help="makes what was saved unusable; takes no argument",
    )
    args = parser.parse_args(argv)
    # The checks break things on purpose; what a connector logs about it says nothing new.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    loop = LoopThread("conformance")
    try:
        ((name, argument),) = parse_connectors(args.connector)
        context = ConnectorContext("decode", argument, loop)
        spoil = _function(args.spoil) if args.spoil else None
        subject = Subject(lambda: make_connector(name, context), spoil=spoil)
        return sum([_run(check, subject) for check in CHECKS]) and 1
    except (BatonError, ValueError, ImportError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        loop.close()


def _run(check: Callable[[Subject], None], subject: Subject) -> bool:
    """True when it failed."""
    name = check.__name__.replace("_", " ")
    if check is CHECKS[-1] and subject.spoil is None:
        print(f"--    {name} (give --spoil)")
        return False
    try:
        check(subject)
    except Exception as error:  # whatever a connector raises is its failure
        print(f"FAIL  {name}: {type(error).__name__}: {error}")
        return True
    print(f"ok    {name}")
    return False


def _function(path: str) -> Callable[[], None]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
