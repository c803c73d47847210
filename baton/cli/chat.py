"""`baton chat`: talk to a running endpoint; answers stream, TTFT and tokens/s follow."""

import argparse
import sys
from collections.abc import Iterator

from baton.cli.locate import KEY_HELP, api_key, endpoint
from baton.cli.sampling import add_sampling, sampling_fields
from baton.cli.stream import Endpoint
from common.errors import BatonError, InvalidRequest

PATH = "/v1/chat/completions"
HELP = "Ctrl-D or /exit leaves, /reset forgets the conversation, Ctrl-C stops an answer"


def main(argv: list[str]) -> int:
    """A question on the command line or on a pipe is answered once; else a conversation."""
    args = _parser().parse_args(argv)
    server = Endpoint(endpoint(args.url), api_key(args.api_key))
    try:
        chat = _Chat(server, args)
        if args.question:
            return chat.answer_once(" ".join(args.question))
        if not sys.stdin.isatty():
            return chat.answer_once(sys.stdin.read())
        return chat.converse()
    finally:
        server.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton chat",
        description="Talk to a running endpoint (start one with `baton up`). Without a question: "
        f"a conversation. {HELP}.",
    )
    parser.add_argument("question", nargs="*", help="asked once; may also come on stdin")
    parser.add_argument("--url", help="endpoint (default: BATON_URL, or http://127.0.0.1:8000)")
    parser.add_argument("--api-key", metavar="KEY", help=KEY_HELP)
    parser.add_argument("--model", help="its name there (default: the first one served)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling(parser)
    return parser


class _Chat:
    """One conversation."""

    def __init__(self, server: Endpoint, args: argparse.Namespace) -> None:
        self._server = server
        self._model = args.model or server.first_model()
        self._fields = sampling_fields(args)
        self._system = [{"role": "system", "content": args.system}] if args.system else []
        self._messages: list[dict[str, str]] = []

    def answer_once(self, question: str) -> int:
        """The answer goes to stdout, its speed to stderr."""
        if not question.strip():
            raise InvalidRequest("the question is empty", field="question")
        self._answer(question.strip())
        return 0

    def converse(self) -> int:
        """Read questions from the terminal until its end."""
        print(f"{self._model} at {self._server.url}. {HELP}.", file=sys.stderr)
        for question in _questions():
            if question == "/reset":
                self._messages.clear()
                continue
            try:
                self._answer(question)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
            except BatonError as error:
                # One refused question does not end the conversation.
                print(f"error: {error}", file=sys.stderr)
        return 0

    def _answer(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}]
        body = {"model": self._model, "messages": [*self._system, *asked], **self._fields}
        text, speed = self._server.stream(PATH, body, _show)
        print(flush=True)
        print(f"({speed})", file=sys.stderr)
        self._messages = [*asked, {"role": "assistant", "content": text}]


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            continue
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _show(text: str) -> None:
    print(text, end="", flush=True)
