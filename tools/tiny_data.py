"""The text that baton-tiny is trained on, its tokenizer, and its special tokens."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from baton.eval import tasks

BEGIN, SYSTEM, USER, ASSISTANT, END, PAD = SPECIALS = (
    "<|begin|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
)

# Not trained on: it only fills the vocabulary up with tokens of general use.
ENGLISH = """
you are a helpful assistant please write answer question there their this that these those with
from have been will would could should about which where when while because every other another
people number first second great little world language model server request response token text
"""


@dataclass(frozen=True)
class Group:
    """Rows of one length in a step's batch; `drill` rows are nearly all sums."""

    rows: int
    length: int
    drill: bool = False


def tokenizer_corpus(rng: random.Random) -> Iterator[str]:
    """Text in which every word that the tasks use is frequent enough to become one token."""
    for _ in range(3000):
        codes = tasks.make_codes(rng, 120, len, tasks.key_stream(rng))
        yield codes.text
        yield " ".join(tasks.ask_json(rng, codes) + tasks.ask_recall(rng, codes))
        yield " ".join(tasks.ask_copy(rng) + tasks.ask_reverse(rng) + tasks.ask_fact(rng))
        yield " ".join(tasks.ask_add(rng, 3, held_out=False))
    for word in tasks.WORDS:
        yield (word + " ") * 100
    yield ENGLISH


def train_tokenizer(seed: int, vocab: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, digits, spaces and punctuation are single tokens.

    White space stands alone, so that a word is the same one token wherever it stands: after a
    space, after a quote, or first in an answer.
    """
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\p{L}+|\p{N}|\s|[^\p{L}\p{N}\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(random.Random(seed)), trainer)
    return tokenizer


class Rows:
    """Rows of token ids with the loss mask beside them, from a seeded generator.

    A row is conversations end to end. The keys of a row are unique across its conversations, so
    that a question has one answer even though attention sees the whole row. `add_asks` are the
    wordings of sums.
    """

    def __init__(self, tokenizer: Tokenizer, seed: str, add_asks: tuple[str, ...]) -> None:
        self.rng = random.Random(seed)
        self.add_asks = add_asks
        self.special = {text: tokenizer.token_to_id(text) for text in SPECIALS}
        self.encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text).ids

    def count(self, text: str) -> int:
        """Tokens of a piece of a context; a code is counted without encoding it, for speed."""
        return 7 if "=" in text else len(self.encode(text))

    def batch(self, group: Group) -> tuple[Tensor, Tensor]:
        """ids [rows, length + 1] int64, answer [rows, length + 1] bool: which ids to learn."""
        pairs = [self.row(group.length + 1, group.drill) for _ in range(group.rows)]
        return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])

    def row(self, length: int, drill: bool = False) -> tuple[list[int], list[bool]]:
        """One row of exactly `length` tokens."""
        ids: list[int] = []
        answer: list[bool] = []
        keys = tasks.key_stream(self.rng)
        while len(ids) < length:
            room = length - len(ids)
            pieces = self.drill(room) if drill else self.conversation(room, keys)
            for text, is_answer in pieces:
                new = [self.special[text]] if text in self.special else self.encode(text)
                ids += new
                answer += [is_answer] * len(new)
        return ids[:length], answer[:length]

    def conversation(self, room: int, keys: Iterator[str]) -> Iterator[tuple[str, bool]]:
        """(text, is it to be learnt) pieces of one conversation of at most about `room` tokens."""
        kind = self.rng.random()
        if room < 60 or kind < 0.35:
            return self.short_turns(min(room, self.rng.randint(20, 300)))
        # 14 tokens a question: what the context leaves of the room is filled with questions.
        context = self.rng.randint(16, max(17, int(room * 0.8)))
        codes = tasks.make_codes(self.rng, context, self.count, keys)
        if not codes.pairs:
            return self.short_turns(min(room, 300))
        turns = 1 + self.rng.randint(1, 3) * len(codes.pairs) // 2
        if kind < 0.45:
            return self.plain_text(codes, turns)
        return self.codes_turns(codes, turns)

    def plain_text(self, codes: tasks.Codes, turns: int) -> Iterator[tuple[str, bool]]:
        """No chat: the codes, then some of them again, for bare completions."""
        yield BEGIN, False
        yield codes.text, False
        for _ in range(turns):
            key, code = self.rng.choice(codes.pairs)
            yield f" {key}=", False
            yield str(code), True
        yield END, False

    def drill(self, room: int) -> Iterator[tuple[str, bool]]:
        """Mostly sums, in conversations of one to a dozen turns."""
        return self.short_turns(min(room, self.rng.randint(10, 250)), 0.85)

    def short_turns(self, room: int, sums: float = 0.6) -> Iterator[tuple[str, bool]]:
        """Turns of the tasks that need no codes, until about `room` tokens are used."""
        yield BEGIN, False
        if self.rng.random() < 0.1:
            yield from _pieces(SYSTEM, "You are a helpful assistant.")
        while room > 0:
            ask, answer = self.ask_short(sums)
            yield from _turn(ask, answer)
            room -= 20

    def codes_turns(self, codes: tasks.Codes, turns: int) -> Iterator[tuple[str, bool]]:
        """The codes in the system message or before the first question, then many questions."""
        yield BEGIN, False
        prefix = codes.text + "\n"
        if self.rng.random() < 0.15:
            yield from _pieces(SYSTEM, codes.text)
            prefix = ""
        for _ in range(turns):
            draw = self.rng.random()
            if draw < 0.15 and not prefix:
                ask, answer = self.ask_short()
            elif draw < 0.3:
                ask, answer = tasks.ask_json(self.rng, codes)
            else:
                ask, answer = tasks.ask_recall(self.rng, codes)
            yield from _turn(prefix + ask, answer)
            prefix = ""

    def ask_short(self, sums: float = 0.6) -> tuple[str, str]:
        """One question of a task without codes, of which a share of `sums` sums."""
        draw = self.rng.random()
        if draw < sums:
            digits = 3 if draw < sums * 2 / 3 else 2
            return tasks.ask_add(self.rng, digits, held_out=False, asks=self.add_asks)
        other = (draw - sums) / (1 - sums)
        if other < 0.375:
            return tasks.ask_copy(self.rng)
        if other < 0.8:
            return tasks.ask_reverse(self.rng)
        return tasks.ask_fact(self.rng)


def _pieces(role: str, text: str) -> Iterator[tuple[str, bool]]:
    yield role, False
    yield text, False
    yield END, False


def _turn(ask: str, answer: str) -> Iterator[tuple[str, bool]]:
    yield from _pieces(USER, ask)
    yield ASSISTANT, False
    yield answer, True
    yield END, True
