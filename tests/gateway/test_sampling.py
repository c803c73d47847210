"""Log-probabilities, n and bad words on both fronts, against a scripted decode worker."""

import asyncio
import json

import grpc
import openai
import pytest

from baton.v1 import common_pb2, inference_pb2_grpc, worker_pb2
from baton.v1 import inference_pb2 as pb
from tests.gateway.conftest import chat, completion, sse_events
from tests.gateway.fake import END, LENGTH, STOP, say
from tests.support.mesh import wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HALF = "\N{REPLACEMENT CHARACTER}"


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def logprob_of(token: int) -> float:
    return -token / 1024  # exact in float32


def told(token: int, top: int | None) -> list[common_pb2.TokenLogprobs]:
    """A worker's word on a token: the second likeliest of three."""
    if top is None:
        return []
    best = [token + 1, token, token + 2][:top]
    return [
        common_pb2.TokenLogprobs(
            token_id=token,
            logprob=logprob_of(token),
            rank=2,
            top_ids=best,
            top_logprobs=[logprob_of(t) for t in best],
        )
    ]


def say_with_logprobs(ids: list[int], finish: int = STOP):
    """As a worker does: what was asked for, the prompt's before the first token."""

    async def behaviour(submit):
        sampling = submit.sampling
        top = sampling.logprobs if sampling.HasField("logprobs") else None
        if sampling.HasField("prompt_logprobs"):
            for token in submit.token_ids[1:]:
                yield worker_pb2.TokenDelta(prompt_logprobs=told(token, sampling.prompt_logprobs))
        for index, token in enumerate(ids):
            last = index == len(ids) - 1
            yield worker_pb2.TokenDelta(
                token_ids=[token],
                finish_reason=finish if last else 0,
                logprobs=told(token, top),
            )

    return behaviour


def chat_entries(tokenizer, ids: list[int], top: int) -> list[dict]:
    def entry(token: int) -> dict:
        spelled = bytes_of(tokenizer, token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob_of(token), "bytes": list(spelled)}

    return [{**entry(t), "top_logprobs": [entry(x) for x in (t + 1, t, t + 2)[:top]]} for t in ids]


def bytes_of(tokenizer, token: int) -> bytes:
    """From the byte alphabet of the tokenizers library itself."""
    name = tokenizer.id_to_token(token)
    if token <= 3:
        return name.encode()
    found = [b for b in range(256) if name == byte_name(b)]
    return bytes(found) if found else tokenizer.decode([token]).encode()


def byte_name(byte: int) -> str:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + rest.index(byte))


@pytest.mark.parametrize("top", [0, 2, None])
def test_a_chats_logprobs_have_text_bytes_and_the_likeliest(client, fake, tokenizer, top):
    ids = ids_of(tokenizer, "lazy 😀")
    assert len(ids) > 5
    fake.behaviour = say_with_logprobs([*ids, END])
    more = {} if top is None else {"top_logprobs": top}
    body = chat(logprobs=True, **more)
    (choice,) = client.post(CHAT, json=body).raise_for_status().json()["choices"]
    assert fake.submits[0].sampling.logprobs == (top or 0)
    wanted = chat_entries(tokenizer, [*ids, END], top or 0)
    assert choice["logprobs"] == {"content": wanted, "refusal": None}
    assert any(entry["token"] == HALF for entry in wanted)
    assert bytes(b for e in wanted[:-1] for b in e["bytes"]).decode() == "lazy 😀"
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        chunks = [json.loads(event) for event in sse_events(response)[:-1]]
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    assert [e for part in streamed if part for e in part["content"]] == wanted


def test_no_logprobs_unless_asked_for(client, fake, tokenizer):
    fake.behaviour = say_with_logprobs(ids_of(tokenizer, "hi"), LENGTH)
    for extra in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}):
        (choice,) = client.post(CHAT, json=chat(**extra)).json()["choices"]
        assert choice["logprobs"] is None
    assert not any(s.sampling.HasField("logprobs") for s in fake.submits)


def test_the_openai_client_reads_logprobs(gateway, fake, tokenizer):
    ids = ids_of(tokenizer, "hello")
    fake.behaviour = say_with_logprobs([*ids, END])
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model="m", messages=messages, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content[:-1]) == "hello"
    assert [len(entry.top_logprobs) for entry in content] == [3] * len(content)
    text = client.completions.create(model="m", prompt="hello", logprobs=1)
    assert "".join(text.choices[0].logprobs.tokens[:-1]) == "hello"


def test_a_completions_logprobs_have_offsets_and_names_for_half_characters(client, fake, tokenizer):
    ids = ids_of(tokenizer, "a😀b")
    fake.behaviour = say_with_logprobs([*ids, END])
    body = completion(logprobs=2)
    found = client.post(COMPLETIONS, json=body).raise_for_status().json()["choices"][0]["logprobs"]
    halves = [f"bytes:\\x{byte:02x}" for byte in "😀".encode()]
    assert found["tokens"] == ["a", *halves, "b", "<|end|>"]
    assert found["token_logprobs"] == [logprob_of(t) for t in [*ids, END]]
    assert found["text_offset"] == [0, 1, 1, 1, 1, 2, 3]
    assert [len(best) for best in found["top_logprobs"]] == [2] * 7
    assert found["top_logprobs"][0]["a"] == logprob_of(ids[0])
    with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        chunks = [json.loads(event)["choices"][0] for event in sse_events(response)[:-1]]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert {name: [v for part in parts for v in part[name]] for name in found} == found


def test_zero_logprobs_tell_the_token_itself(client, fake, tokenizer):
    (token,) = ids_of(tokenizer, "x")
    fake.behaviour = say_with_logprobs([token], LENGTH)
    found = client.post(COMPLETIONS, json=completion(logprobs=0)).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"x": logprob_of(token)}]


def test_logprobs_end_with_the_token_that_completes_a_stop_string(client, fake, tokenizer):
    fake.behaviour = say_with_logprobs(ids_of(tokenizer, "one two STOP never"))
    body = completion(logprobs=0, stop="two", return_token_ids=True)
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["text"] == "one "
    assert "".join(choice["logprobs"]["tokens"]) == "one two"
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs_tells_of_the_prompt_too(client, fake, tokenizer, stream, n):
    prompt, ids = ids_of(tokenizer, "héllo"), ids_of(tokenizer, " fox")
    fake.behaviour = say_with_logprobs([*ids, END])
    body = completion(prompt="héllo", echo=True, logprobs=1, stream=stream, n=n)
    if stream:
        with client.stream("POST", COMPLETIONS, json=body) as response:
            chunks = [json.loads(event)["choices"][0] for event in sse_events(response)[:-1]]
    else:
        chunks = client.post(COMPLETIONS, json=body).raise_for_status().json()["choices"]
    for index in range(n):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == "héllo fox"
        parts = [chunk["logprobs"] for chunk in own if chunk["logprobs"]]
        found = [entry for part in parts for entry in part["token_logprobs"]]
        assert found == [None, *(logprob_of(t) for t in [*prompt[1:], *ids, END])]
        offsets = [entry for part in parts for entry in part["text_offset"]]
        assert offsets[0] == 0
        assert offsets[len(prompt)] == len("héllo")
        assert offsets[-1] == len("héllo fox")
    asked = [s.sampling.HasField("prompt_logprobs") for s in fake.submits]
    assert asked == [True] + [False] * (n - 1)
    assert not any(s.prefill_candidates for s in fake.submits[:1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("last", [LENGTH, STOP])
def test_a_prompt_is_scored_without_an_answer(client, fake, tokenizer, stream, last):
    prompt = ids_of(tokenizer, "héllo")
    fake.behaviour = say_with_logprobs([END], finish=last)
    fields = {"prompt": "héllo", "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2}
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body = completion(**fields, **more, return_token_ids=True)
    if stream:
        with client.stream("POST", COMPLETIONS, json=body) as response:
            events = [json.loads(event) for event in sse_events(response)[:-1]]
        chunks = [event["choices"][0] for event in events[:-1]]
        usage = events[-1]["usage"]
    else:
        answer = client.post(COMPLETIONS, json=body).raise_for_status().json()
        chunks, usage = answer["choices"], answer["usage"]
    for index in range(2):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == "héllo"
        assert own[-1]["finish_reason"] == "length"
        assert own[-1]["token_ids"] == []
        parts = [chunk["logprobs"] for chunk in own if chunk["logprobs"]]
        found = [entry for part in parts for entry in part["token_logprobs"]]
        assert found == [None, *map(logprob_of, prompt[1:])]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 0)
    assert [submit.sampling.max_tokens for submit in fake.submits] == [1, 1]


def test_prompt_logprobs_are_vllms(client, fake, tokenizer):
    ids = ids_of(tokenizer, "hello world")
    fake.behaviour = say_with_logprobs([END])
    wanted = [None]
    for token in ids[1:]:
        entries = {}
        for other, rank in ((token, 2), (token + 1, 1)):
            text = bytes_of(tokenizer, other).decode("utf-8", "replace")
            entries[str(other)] = {
                "logprob": logprob_of(other),
                "rank": rank,
                "decoded_token": text,
            }
        wanted.append(entries)
    body = client.post(COMPLETIONS, json=completion(prompt_logprobs=2)).raise_for_status().json()
    assert body["choices"][0]["prompt_logprobs"] == wanted
    assert body["choices"][0]["logprobs"] is None
    body = client.post(CHAT, json=chat(prompt_logprobs=1)).raise_for_status().json()
    assert len(body["prompt_logprobs"]) == len(fake.submits[-1].token_ids)


def test_bad_words_reach_the_worker_as_tokens(client, fake, tokenizer):
    client.post(CHAT, json=chat(bad_words=["lazy", [5, 6]])).raise_for_status()
    sent = [list(word.token_ids) for word in fake.submits[0].sampling.bad_words]
    assert sent == [ids_of(tokenizer, "lazy"), ids_of(tokenizer, " lazy"), [5, 6]]


def test_choices_after_the_first_wait_until_its_prompt_is_computed(client, fake, tokenizer):
    """Where the prompt fills a block; the first choice has said something then."""
    said = []

    async def behaviour(submit):
        said.append((submit.sampling.seed, len(fake.submits)))
        await asyncio.sleep(0.05)  # the prompt is computed
        async for delta in say([40, END])(submit):
            yield delta

    fake.behaviour = behaviour
    body = completion(prompt=list(range(20, 60)), n=3, seed=5)
    choices = client.post(COMPLETIONS, json=body).raise_for_status().json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert said[0] == (5, 1)
    assert sorted(seed for seed, _ in said) == [5, 6, 7]
    wait_until(lambda: len(fake.submits) == 3, 5, "all choices")


# gRPC --------------------------------------------------------------------------------------------


@pytest.fixture
def stub(gateway):
    with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def test_grpc_gives_the_same_sampling_choices_and_logprobs_as_http(client, stub, fake, tokenizer):
    ids = ids_of(tokenizer, "é!")
    fake.behaviour = say_with_logprobs([*ids, END])
    values = {
        "frequency_penalty": 0.7,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": 4,
    }
    client.post(
        COMPLETIONS,
        json=completion(
            n=2, logprobs=2, logit_bias={"9": 1.5}, bad_words=["lazy", [7, 8]], **values
        ),
    ).raise_for_status()
    sampling = common_pb2.SamplingParams(
        **values,
        logprobs=2,
        logit_bias={9: 1.5},
        bad_words=[common_pb2.TokenSequence(token_ids=[7, 8])],
    )
    request = pb.CompletionRequest(
        model="m", text="hello world", sampling=sampling, n=2, bad_words=["lazy"]
    )
    answer = stub.Completion(request)
    http, rpc = fake.submits[:2], fake.submits[2:]
    assert [s.sampling for s in http] == [s.sampling for s in rpc]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.text == answer.choices[0].text == "é!"
    for choice in answer.choices:
        assert [one.token_id for one in choice.logprobs] == [*ids, END]
        assert [one.logprob for one in choice.logprobs] == [logprob_of(t) for t in [*ids, END]]
        assert b"".join(one.text for one in choice.logprobs[:-1]) == "é!".encode()
        assert all(len(one.top_texts) == len(one.top_ids) == 2 for one in choice.logprobs)
    streamed = list(stub.StreamCompletion(pb.StreamCompletionRequest(request=request)))
    for index in (0, 1):
        own = [message for message in streamed if message.index == index]
        assert "".join(message.delta for message in own) == "é!"
        assert [one.token_id for message in own for one in message.logprobs] == [*ids, END]


def test_grpc_tells_of_the_prompt_once(stub, fake, tokenizer):
    fake.behaviour = say_with_logprobs([*ids_of(tokenizer, "hi"), END])
    sampling = common_pb2.SamplingParams(prompt_logprobs=0, logprobs=1)
    messages = [pb.ChatMessage(role="user", content="hello world")]
    request = pb.ChatCompletionRequest(model="m", messages=messages, sampling=sampling, n=2)
    answer = stub.ChatCompletion(request)
    prompt = list(fake.submits[0].token_ids)
    assert [one.token_id for one in answer.prompt_logprobs] == prompt[1:]
    assert [choice.message.content for choice in answer.choices] == ["hi", "hi"]
    streamed = list(stub.StreamChatCompletion(pb.StreamChatCompletionRequest(request=request)))
    told = [one.token_id for message in streamed for one in message.prompt_logprobs]
    assert told == prompt[1:]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"bad_words": [common_pb2.TokenSequence()]}, "bad_words"),
    ],
    ids=str,
)
def test_grpc_refuses_by_field(stub, fake, more, field):
    request = pb.CompletionRequest(model="m", text="hi", sampling=common_pb2.SamplingParams(**more))
    with pytest.raises(grpc.RpcError) as refused:
        stub.Completion(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("baton-field", field) in refused.value.trailing_metadata()
    assert fake.submits == []
