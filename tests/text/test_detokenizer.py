import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.text.detokenizer import REPLACEMENT, IncrementalDecoder, StopMatcher

TEXTS = [
    "Hello world, how are you today?",
    "naïve café — “quotes” €100 \U0001f600\U0001f468‍\U0001f469‍\U0001f467 done",
    "日本語のテキスト と 한국어 mixed",
    "  leading and  double   spaces\n\ttabs\n",
    "<|s|>a special one<|e|> within",
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|s|>", "<|e|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:1], trainer)
    return tokenizer


def sentencepiece():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    words = ["▁", "▁Hello", "▁world", "H", "e", "l", "o", "w", "a", "n", "▁a", ",", "c", "f"]
    vocab.update({word: 259 + index for index, word in enumerate(words)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def sentencepiece_ids(text):
    tokenizer = sentencepiece()
    ids = []
    for char in text.replace(" ", "▁"):
        token = tokenizer.token_to_id(char)
        ids += [token] if token is not None else [3 + byte for byte in char.encode()]
    return ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_a_byte_level_text_add_up_to_the_decode_of_all(text, seed):
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    decoder = IncrementalDecoder(tokenizer)
    rng = random.Random(seed)
    pieces, at = [], 0
    while at < len(ids):
        step = rng.randint(1, 3)
        pieces.append(decoder.push(ids[at : at + step]))
        at += step
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", [" Hello world, café €\U0001f600 and 日本 a", "a€b€", "€€€", "Hé"])
def test_pieces_of_a_byte_fallback_text_add_up_to_the_decode_of_all(text):
    tokenizer = sentencepiece()
    ids = sentencepiece_ids(text)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_a_word_behind_a_prompt_keeps_its_space():
    tokenizer = sentencepiece()
    hello, world = tokenizer.token_to_id("▁Hello"), tokenizer.token_to_id("▁world")
    assert IncrementalDecoder(tokenizer, prompt_ids=[1, hello]).push([world]) == " world"
    assert IncrementalDecoder(tokenizer, prompt_ids=[1]).push([world]) == "world"


def test_a_special_token_inside_does_not_swallow_the_next_space():
    tokenizer = sentencepiece()
    hello, world = tokenizer.token_to_id("▁Hello"), tokenizer.token_to_id("▁world")
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push([hello, 2]) + decoder.push([world]) == "Hello world"


def test_an_unfinished_character_is_held_and_replaced_only_at_the_end():
    tokenizer = byte_level()
    ids = tokenizer.encode("a\U0001f600").ids
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.push([token]) for token in ids[:-1]) == "a"
    assert decoder.flush() == REPLACEMENT


def test_a_prompt_that_ends_inside_a_character_is_continued():
    tokenizer = byte_level()
    ids = tokenizer.encode("€").ids
    assert len(ids) == 3
    assert IncrementalDecoder(tokenizer, prompt_ids=ids[:2]).push(ids[2:]) == "€"


def test_special_tokens_are_shown_only_when_asked():
    tokenizer = byte_level()
    ids = tokenizer.encode("<|s|>hi<|e|>").ids
    assert IncrementalDecoder(tokenizer).push(ids) == "hi"
    assert IncrementalDecoder(tokenizer, skip_special_tokens=False).push(ids) == "<|s|>hi<|e|>"


def test_random_tokens_give_the_lossy_decode_of_all_their_bytes():
    tokenizer = byte_level()
    rng = random.Random(7)
    for _ in range(20):
        ids = [rng.randrange(2, tokenizer.get_vocab_size()) for _ in range(60)]
        decoder = IncrementalDecoder(tokenizer)
        text = "".join(decoder.push([token]) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)


def first_stop(text, stops):
    """The text before the stop string that ends first (of those, the longest), by brute force."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            match = max(done, key=len)
            return text[: end - len(match)], match
    return text, None


def test_stop_strings_are_found_wherever_the_text_is_cut():
    rng = random.Random(3)
    for _ in range(400):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 14)))
        stops = tuple(
            "".join(rng.choice("ab") for _ in range(rng.randint(1, 5)))
            for _ in range(rng.randint(0, 3))
        )
        matcher = StopMatcher(stops)
        got, at = "", 0
        while at < len(text):
            step = rng.randint(1, 4)
            got += matcher.push(text[at : at + step])
            before_stop, match = first_stop(text, stops)
            assert before_stop.startswith(got)  # never text that a stop string takes back
            at += step
        got += matcher.flush() if matcher.stopped is None else ""
        assert (got, matcher.stopped) == (before_stop if text else "", match if text else None)


def test_text_ends_before_a_stop_string_across_token_borders():
    tokenizer = byte_level()
    ids = tokenizer.encode("one two END three").ids
    decoder = IncrementalDecoder(tokenizer, stop=("END", "never"))
    pieces = [decoder.push([token]) for token in ids]
    assert "".join(pieces) == "one two "
    assert decoder.stopped == "END"
    assert decoder.flush() == ""


def test_the_held_start_of_a_stop_string_comes_out_at_the_end():
    tokenizer = byte_level()
    decoder = IncrementalDecoder(tokenizer, stop=("END",))
    assert decoder.push(tokenizer.encode("the EN").ids) == "the "
    assert decoder.flush() == "EN"
    assert decoder.stopped is None
