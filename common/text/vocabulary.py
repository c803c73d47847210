"""Text to and from single tokens: what one token spells, and which tokens spell a bad word."""

from collections.abc import Iterable
from functools import lru_cache

from tokenizers import Tokenizer, decoders

from common.errors import InvalidRequest
from common.text.detokenizer import byte_alphabet, fallback_byte


@lru_cache(maxsize=65536)
def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token adds to a text, which may be part of a character; b'' for an id that
    the tokenizer does not know."""
    name = tokenizer.id_to_token(token)
    if name is None:
        return b""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        alphabet = byte_alphabet()
        if all(char in alphabet for char in name):
            return bytes(alphabet[char] for char in name)
        return name.encode()  # an added token is plain text
    byte = fallback_byte(name)
    if byte is not None:
        return bytes([byte])
    # Behind itself a token shows the space that some tokenizers drop at the start of a text.
    once = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.decode([token, token], skip_special_tokens=False)[len(once) :].encode()


@lru_cache(maxsize=16)
def special_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that have no text in an answer: end-of-sequence and the like."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, entry in added.items() if entry.special)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, U+FFFD in place of what is no whole character."""
    return token_bytes(tokenizer, token).decode("utf-8", errors="replace")


def bad_word_ids(
    tokenizer: Tokenizer | None, words: Iterable[str | tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """Token sequences for `SamplingParams.bad_words`: a text as it is spelled at the start of a
    text or inside a word, and behind a space (as in vLLM).

    Raises InvalidRequest for a text that no tokenizer is there for, or that has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not isinstance(word, str):
            found[word] = None
            continue
        if tokenizer is None:
            raise InvalidRequest(
                "bad_words holds text, and this model has no tokenizer; give token ids",
                field="bad_words",
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            if not ids or not text.strip():
                raise InvalidRequest(
                    f"bad_words holds {word!r}, which has no tokens", field="bad_words"
                )
            found[ids] = None
    return tuple(found)
