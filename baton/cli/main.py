"""`baton`: one name, then a command. A command's module is imported only when it is the one."""

import argparse
import importlib
import sys
from collections.abc import Callable

from baton import __version__
from common.errors import BatonError

# name: (module with main(argv) -> exit code, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("baton.cli.up", "start the whole mesh on this machine"),
    "chat": ("baton.cli.chat", "talk to a running endpoint"),
    "generate": ("baton.cli.generate", "complete prompts, with a model folder or an endpoint"),
    "doctor": ("baton.cli.doctor", "check this machine, and say what to do"),
    "serve": ("baton.cli.serve", "run one service: gateway, prefill, decode or kvstore"),
    "quantize": ("baton.cli.quantize", "write an FP8 checkpoint from an unquantized one"),
    "eval": ("baton.eval.run", "exact-match accuracy of a model folder or an endpoint"),
    "bench": ("baton.cli.bench", "measure the speed of an endpoint, or of a model in this process"),
}
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors of Baton's own are printed as one line."""
    args = _parser().parse_args(argv)
    if args.command is None:
        _parser().print_help()
        return 2
    module, _ = COMMANDS[args.command]
    try:
        run: Callable[[list[str]], int | None] = importlib.import_module(module).main
        return run(args.rest) or 0
    except ModuleNotFoundError as error:
        print(
            f"baton {args.command}: error: package {error.name!r} is not installed; "
            "`baton doctor` says which extra has it",
            file=sys.stderr,
        )
        return 1
    except BatonError as error:
        print(f"baton {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve language models from separate prefill and decode services.",
        epilog=f"commands:\n{table}\n\n`baton COMMAND --help` says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"baton {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND")
    # What follows belongs to the command, its flags included.
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
