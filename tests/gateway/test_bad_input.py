"""What the gateway refuses, with the field that it names. No worker ever sees any of it."""

import json

import pytest

from tests.gateway.conftest import chat, completion
from tests.gateway.fake import CONTEXT, VOCAB

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "hi " * CONTEXT}]}, "messages"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": "two"}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": CONTEXT}, "min_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"frequency_penalty": "much"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"bad_words": 5}, "bad_words"),
    ({"bad_words": [5]}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": [[]]}, "bad_words"),
    ({"bad_words": [[VOCAB]]}, "bad_words"),
    ({"bad_words": [["a"]]}, "bad_words"),
    ({"bad_words": ["x" * 201]}, "bad_words"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]

BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [VOCAB]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [[1], [VOCAB]]}, "prompt[1]"),
    ({"prompt": ["a", [1, "x"]]}, "prompt[1]"),
    ({"prompt": ["a"] * 33}, "prompt"),
    ({"prompt": [5] * CONTEXT}, "prompt"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1, "echo": True}, "max_tokens"),
]


def check(response, status: int, field: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert field.partition("[")[0] in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "field"), BAD_CHATS, ids=str)
def test_a_chat_that_does_not_fit_is_400_and_names_the_field(client, fake, change, field):
    check(client.post(CHAT, json=chat(**change)), 400, field)
    assert fake.submits == []


@pytest.mark.parametrize(("change", "field"), BAD_COMPLETIONS, ids=lambda v: str(v)[:40])
def test_a_completion_that_does_not_fit_is_400_and_names_the_field(client, fake, change, field):
    check(client.post(COMPLETIONS, json=completion(**change)), 400, field)
    assert fake.submits == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": Infinity}',
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b"[" * 60_000,
        b'{"seed": ' + b"9" * 6000 + b"}",
    ],
    ids=lambda b: repr(b[:20]),
)
def test_a_body_that_is_no_json_object_is_400(client, fake, body):
    if len(body) > 65_536:
        body = body[: 65_536 // 2]
    check(client.post(CHAT, content=body), 400, "body")
    assert fake.submits == []


def test_a_number_too_large_for_a_float_is_400(client):
    body = json.dumps(chat()).replace('"m"', '"m", "temperature": 1e999')
    check(client.post(CHAT, content=body), 400, "temperature")
    body = json.dumps(chat()).replace('"m"', '"m", "temperature": ' + "9" * 400)
    check(client.post(CHAT, content=body), 400, "temperature")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            CHAT,
            r'{"model":"m","messages":[{"role":"user","content":"\ud83d"}]}',
            "messages[0].content",
        ),
        (COMPLETIONS, r'{"model":"m","prompt":"a\udfffb"}', "prompt"),
        (COMPLETIONS, r'{"model":"m","prompt":"a","stop":["\ud800"]}', "stop[0]"),
        (COMPLETIONS, r'{"model":"\ud800","prompt":"a"}', "model"),
    ],
)
def test_a_lone_surrogate_is_400_and_names_the_field(client, fake, path, body, field):
    check(client.post(path, content=body), 400, field)
    assert fake.submits == []


def test_a_surrogate_pair_is_one_character(client, fake, tokenizer):
    body = r'{"model":"m","prompt":"\ud83d\ude00"}'
    client.post(COMPLETIONS, content=body).raise_for_status()
    assert list(fake.submits[0].token_ids) == tokenizer.encode("😀").ids


def test_an_unknown_model_is_404(client, fake):
    check(client.post(CHAT, json=chat(model="gpt-7")), 404, "model")
    check(client.post(COMPLETIONS, json=completion(model="gpt-7")), 404, "model")
    assert client.post(CHAT, json=chat(model="x")).json()["error"]["code"] == "model_not_found"


def test_a_body_over_the_limit_is_413(client, fake):
    check(client.post(CHAT, json=chat(user="x" * 70_000)), 413, "body")
    chunks = (b" " * 1000 for _ in range(100))
    check(client.post(CHAT, content=chunks), 413, "body")


def test_fields_that_clients_send_beside_are_ignored(client, fake):
    extra = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "vendor_field": [1],
        "presence_penalty": 0,
        "frequency_penalty": None,
        "logprobs": False,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
    }
    assert client.post(CHAT, json=chat(**extra)).status_code == 200
    twice = json.dumps(chat())[:-1] + ', "model": "m"}'
    assert client.post(CHAT, content=twice).status_code == 200


def test_the_worker_serves_on_after_all_of_it(client, fake):
    assert client.post(CHAT, json=chat()).status_code == 200
    assert client.get("/debug/state").json()["gateway"]["in_flight"] == 0
