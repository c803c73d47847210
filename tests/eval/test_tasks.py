"""The questions: the same from the same seed, answerable, and the sums unseen in training."""

import json
import random

import pytest

from baton.eval import tasks
from baton.eval.run import make_questions, score, table


def words(text: str) -> int:
    return len(text.split())


def test_the_same_seed_makes_the_same_questions():
    assert make_questions(3, 5, words) == make_questions(3, 5, words)


def test_another_seed_makes_other_questions():
    assert make_questions(3, 5, words) != make_questions(3, 6, words)


def test_a_line_of_the_table_does_not_depend_on_the_other_lines():
    alone = make_questions(3, 5, words, contexts=(512,))
    among = make_questions(3, 5, words, contexts=(128, 512))
    assert alone[:3] == among[3:6]


def test_words_are_distinct():
    assert len(set(tasks.WORDS)) == len(tasks.WORDS)


@pytest.mark.parametrize("context", [64, 300, 900])
def test_recall_asks_for_a_code_that_stands_exactly_once_in_a_context_of_the_length(context):
    for seed in range(20):
        question = tasks.recall(random.Random(seed), context, len)
        text, ask = question.messages[-1]["content"].split("\n")
        entries = [piece.split("=") for piece in text.split() if "=" in piece]
        asked = [code for key, code in entries if key in ask.rstrip("?.").split()]
        assert asked == [question.answer]
        assert len({key for key, _ in entries}) == len(entries)
        assert context - len(text) <= len(entries) + 120  # counted piece by piece, cut at the end


def test_json_answers_are_json_of_the_name_and_the_code():
    question = tasks.json_recall(random.Random(3), 200, len)
    answer = json.loads(question.answer)
    assert f"{answer['name']}={answer['code']}" in question.messages[-1]["content"]


@pytest.mark.parametrize("digits", [2, 3])
def test_held_out_sums_are_right_and_never_in_training(digits):
    rng = random.Random(0)
    for held_out in (True, False):
        for _ in range(300):
            ask, answer = tasks.ask_add(rng, digits, held_out=held_out)
            spaced = "".join(c if c.isdigit() else " " for c in ask)
            a, b = map(int, spaced.split())
            assert a + b == int(answer)
            assert len(str(a)) == len(str(b)) == digits
            assert tasks.is_held_out_pair(a, b) == held_out


def test_about_one_pair_in_ten_is_held_out():
    held_out = sum(tasks.is_held_out_pair(a, b) for a in range(100, 300) for b in range(100, 300))
    assert 0.08 < held_out / 200**2 < 0.12


def test_reverse_reverses():
    ask, answer = tasks.ask_reverse(random.Random(1))
    assert ask.endswith(" ".join(reversed(answer.split())))


def test_copy_copies():
    ask, answer = tasks.ask_copy(random.Random(1))
    assert ask.endswith(answer)


def test_no_two_facts_share_a_wording():
    wordings = [wording for group, _ in tasks.FACTS for wording in group]
    assert len(set(wordings)) == len(wordings)


def test_score_counts_exact_matches_by_task_and_context():
    questions = make_questions(2, 0, words, contexts=(50,))
    answers = [question.answer for question in questions]
    answers[1] = answers[1] + "1"
    answers[0] = f" {answers[0]}\n"  # white space around an answer is not counted against it
    scores = score(questions, answers, words)
    assert [(s.correct, s.questions) for s in scores] == [(1, 2)] + [(2, 2)] * 7
    assert "| recall | 50 |" in table(scores)
    assert "| 50.0% | 1 | 2 |" in table(scores)
