"""The bundled checkpoint: its size, its tokenizer, its template, and that it answers right."""

import json
import random

import pytest
from tokenizers import Tokenizer

from baton.eval import tasks
from baton.eval.run import (
    BUNDLED_MODEL,
    make_questions,
    prompt_encoder,
    score,
    token_counter,
    transformers_answerer,
)

TEXTS = [
    "",
    " ",
    "plain words, and  double   spaces\n\n\ttabs \r\n",
    "Grüße, ça va? Ещё раз. 漢字かな交じり文 한국어 العربية עברית ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 \U0001f9ff \N{COMBINING ACUTE ACCENT}e\N{COMBINING ACUTE ACCENT}",
    "\N{ZERO WIDTH JOINER}\N{NO-BREAK SPACE}\x00\x7f\ufeff\U0010ffff",
    "def f(x): return {'a': [1, 2.5e-3], \"b\": None}  # ½ ² ٣",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))


def config(name: str) -> dict:
    return json.loads((BUNDLED_MODEL / name).read_text(encoding="utf-8"))


def test_the_folder_is_at_most_16_mb():
    files = [path for path in BUNDLED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_the_tokenizer_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_every_digit_is_one_token_of_its_own(tokenizer):
    assert tokenizer.encode("river=4821", add_special_tokens=False).tokens[-4:] == list("4821")


def test_every_word_is_one_token_wherever_it_stands(tokenizer):
    for word in tasks.WORDS:
        assert tokenizer.encode(word).tokens == [word]
        assert tokenizer.encode(f' "{word}"').tokens[2] == word


def test_the_vocabulary_is_as_large_as_the_models(tokenizer):
    assert tokenizer.get_vocab_size() == config("config.json")["vocab_size"]


def test_the_context_is_at_least_2048_tokens():
    assert config("config.json")["max_position_embeddings"] >= 2048


def test_the_end_of_a_turn_ends_generation(tokenizer):
    end = tokenizer.token_to_id("<|end|>")
    assert config("config.json")["eos_token_id"] == end
    assert config("generation_config.json")["eos_token_id"] == end
    assert config("tokenizer_config.json")["eos_token"] == "<|end|>"


def test_the_chat_template_renders_roles_parts_and_the_prompt():
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(BUNDLED_MODEL).apply_chat_template(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": part} for part in ("a ", "b")]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": " d\n"},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|begin|><|system|>S<|end|><|user|>a b<|end|><|assistant|>c<|end|><|user|> d\n<|end|>"
        "<|assistant|>"
    )


def test_transformers_and_the_plain_tokenizer_build_the_same_prompt():
    from transformers import AutoTokenizer

    question = tasks.recall(random.Random(0), 100, token_counter(BUNDLED_MODEL))
    theirs = AutoTokenizer.from_pretrained(BUNDLED_MODEL).apply_chat_template(
        list(question.messages), add_generation_prompt=True, return_dict=True
    )
    assert prompt_encoder(BUNDLED_MODEL)(question) == theirs["input_ids"]


def test_the_checkpoint_recalls_over_1500_tokens_and_knows_its_facts():
    count_tokens = token_counter(BUNDLED_MODEL)
    questions = make_questions(20, 7, count_tokens, contexts=(1500,))
    questions = [q for q in questions if q.task in ("recall", "facts", "copy")]
    answers = transformers_answerer(BUNDLED_MODEL, "bfloat16")(questions)
    accuracy = {s.task: s.accuracy for s in score(questions, answers, count_tokens)}
    assert accuracy["recall"] >= 0.95
    assert accuracy["facts"] >= 0.95
    assert accuracy["copy"] >= 0.9
