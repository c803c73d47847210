"""Tokens to text while they arrive: never half a character, never the start of a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A UTF-8 character has at most four bytes, so more tokens than this that still end in a
# replacement character are not an unfinished character but one that never will be.
MAX_HELD_TOKENS = 8

# Tokens of context that a decoder may look at to decide on the space before a word.
CONTEXT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class _TokenTable:
    """What is known of a tokenizer: `hidden` are the ids of its special tokens, `byte_level` tells
    whether a token's bytes can be read off its name (GPT-2's alphabet of bytes)."""

    tokenizer: Tokenizer
    hidden: frozenset[int]
    byte_level: bool


@lru_cache(maxsize=16)
def _table_of(tokenizer: Tokenizer) -> _TokenTable:
    added = tokenizer.get_added_tokens_decoder()
    return _TokenTable(
        tokenizer=tokenizer,
        hidden=frozenset(token for token, entry in added.items() if entry.special),
        byte_level=isinstance(tokenizer.decoder, decoders.ByteLevel),
    )


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable name of each byte (Radford et al. 2019): the printable bytes of Latin-1
    name themselves, the others are counted up from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet


class _ByteLevelDecoder:
    """Each token is a few bytes; an incremental UTF-8 decoder does the rest."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context:  # a prompt may end inside a character
            self.push(token)

    def push(self, token: int) -> str:
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token) or ""
        alphabet = byte_alphabet()
        try:
            return bytes([alphabet[char] for char in name])
        except KeyError:  # an added token is plain text
            return name.encode()


class _WindowDecoder:
    """Any other decoder (SentencePiece's spaces, byte fallback, WordPiece): decode the new tokens
    behind a few old ones, and give what is new. Runs of byte tokens `<0xE2>` are decoded apart,
    since such a run has no text until it is complete."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context = list(context)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        byte = fallback_byte(self._tokenizer.id_to_token(token))
        if byte is not None:
            text = self._take_held() + self._utf8.decode(bytes([byte]))
            self._context = [token]
            return text
        text = self.flush_bytes()
        self._held.append(token)
        new = self._new_text()
        if new.endswith(REPLACEMENT) and len(self._held) < MAX_HELD_TOKENS:
            return text
        return text + self._take_held()

    def flush(self) -> str:
        return self._take_held() + self.flush_bytes()

    def flush_bytes(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _take_held(self) -> str:
        if not self._held:
            return ""
        new = self._new_text()
        self._context = (self._context + self._held)[-CONTEXT_TOKENS:]
        self._held = []
        return new

    def _new_text(self) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._held)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def fallback_byte(name: str | None) -> int | None:
    """The byte that SentencePiece's byte token `<0xE2>` stands for; None for other names."""
    if name is None or len(name) != 6 or not name.startswith("<0x") or name[5] != ">":
        return None
    try:
        return int(name[3:5], 16)
    except ValueError:
        return None


class _StopString:
    """One stop string's automaton (Knuth, Morris and Pratt 1977): `matched` is how many of its
    characters the text so far ends with."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length - 1]
            length += text[index] == text[length]
            self._fallback[index] = length

    def push(self, char: str) -> bool:
        """True when `char` completes the string; no more may be pushed then."""
        while self.matched and char != self.text[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        if char == self.text[self.matched]:
            self.matched += 1
        return self.matched == len(self.text)


class StopMatcher:
    """Finds the first stop string to be complete, however the text is cut into pieces, and holds
    back the end of the text while it may still be the start of one."""

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._stops = [_StopString(text) for text in stop if text]
        self._held = ""
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stopped

    def push(self, text: str) -> str:
        """The text that is now known to come before any stop string."""
        if self._stopped is not None:
            return ""
        if not self._stops:
            return text
        for index, char in enumerate(text):
            done = [stop for stop in self._stops if stop.push(char)]
            if done:  # of several that end here the longest begins first
                match = max((stop.text for stop in done), key=len)
                self._stopped = match
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(match)]
        seen = self._held + text
        keep = max(stop.matched for stop in self._stops)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class IncrementalDecoder:
    """Text of one sequence's tokens, given as soon as it cannot change any more.

    tokenizer            the model's
    prompt_ids           the tokens before the first pushed one: they decide on a leading space
    skip_special_tokens  leave out end-of-sequence and the like
    stop                 strings that end the text and are not part of it

    All pieces together are the tokenizer's decode of all tokens (up to the stop string); bytes
    that are no UTF-8 become U+FFFD. The cost of a token does not grow with the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Iterable[str] = (),
    ) -> None:
        table = _table_of(tokenizer)
        self._hidden = table.hidden if skip_special_tokens else frozenset()
        # A window twice as long as needed: some of its tokens may be hidden ones.
        context = [t for t in prompt_ids[-2 * CONTEXT_TOKENS :] if t not in table.hidden]
        context = context[-CONTEXT_TOKENS:]
        decoder = _ByteLevelDecoder if table.byte_level else _WindowDecoder
        self._decoder = decoder(tokenizer, context)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text; None while there was none."""
        return self._matcher.stopped

    def push(self, ids: Iterable[int]) -> str:
        """Take tokens; return the text that is now safe to emit ('' after a stop string)."""
        pieces = []
        for token in ids:
            if self.stopped is not None:
                break
            if token not in self._hidden:
                pieces.append(self._matcher.push(self._decoder.push(token)))
        return "".join(pieces)

    def flush(self) -> str:
        """The end of the sequence: what was held back. Unfinished characters become U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._matcher.push(self._decoder.flush())
        return text + self._matcher.flush()
