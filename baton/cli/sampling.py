"""Sampling flags that `chat` and `generate` share. Unset means: as the server or model has it."""

import argparse
from typing import Any

# flag: (type, help)
_FLAGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens of an answer"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "sample from the k most likely tokens"),
    "top_p": (float, "sample from the most likely tokens of this total probability"),
    "min_p": (float, "leave out tokens below this share of the most likely one's probability"),
    "frequency_penalty": (float, "taken from a token's logit for each time it was generated"),
    "presence_penalty": (float, "taken from a token's logit once it was generated"),
    "repetition_penalty": (float, "over 1: makes tokens of prompt and answer less likely"),
    "seed": (int, "the same seed gives the same answer"),
}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    group.add_argument(
        "--bad-word", dest="bad_words", action="append", metavar="TEXT", help="never say this"
    )


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, by their names in the API and in SamplingParams."""
    names = (*_FLAGS, "stop", "bad_words")
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}
