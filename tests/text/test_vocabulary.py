import pytest
from tokenizers import Tokenizer, decoders, models

from common.errors import InvalidRequest
from common.text.vocabulary import bad_word_ids, special_tokens, token_bytes, token_text
from tests.text.test_detokenizer import TEXTS, byte_level, sentencepiece, sentencepiece_ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_of_a_text_are_its_bytes(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()


@pytest.mark.parametrize("text", [" Hello world", " Hello, café \U0001f600"])
def test_sentencepiece_tokens_keep_their_spaces_and_bytes(text):
    tokenizer = sentencepiece()
    ids = sentencepiece_ids(text)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    word = tokenizer.token_to_id("▁Hello")
    assert token_text(tokenizer, word) == " Hello"


def test_wordpiece_tokens_are_words_behind_a_space_or_parts_of_one():
    vocab = {"[UNK]": 0, "play": 1, "##ing": 2}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert [token_bytes(tokenizer, token) for token in (1, 2)] == [b" play", b"ing"]


def test_half_a_character_is_a_replacement_and_an_unknown_id_is_nothing():
    tokenizer = byte_level()
    first, *_ = tokenizer.encode("\U0001f600").ids
    assert token_text(tokenizer, first) == "\N{REPLACEMENT CHARACTER}"
    assert token_bytes(tokenizer, 10**6) == b""
    assert special_tokens(tokenizer) == {0, 1}
    assert token_text(tokenizer, 0) == "<|s|>"


def test_a_bad_word_stands_for_its_tokens_with_and_without_a_space():
    tokenizer = byte_level()
    wanted = [tuple(tokenizer.encode(text).ids) for text in ("you", " you")]
    assert wanted[0] != wanted[1]
    assert list(bad_word_ids(tokenizer, [" you", (7, 8), "you"])) == [*wanted, (7, 8)]


@pytest.mark.parametrize(("words", "tokenizer"), [(["  "], byte_level()), (["x"], None)])
def test_a_bad_word_without_tokens_is_refused(words, tokenizer):
    with pytest.raises(InvalidRequest) as caught:
        bad_word_ids(tokenizer, words)
    assert caught.value.field == "bad_words"
