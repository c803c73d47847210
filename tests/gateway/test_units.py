"""Routing, admission and prompts without sockets; what the gateway imports."""

import asyncio
import subprocess
import sys
import time

import pytest

from common.errors import DeadlineExceeded, Overloaded, Unavailable
from services.gateway.admission import Admission
from services.gateway.prompts import PromptEncoder
from services.gateway.router import PrefixIndex, choose_route
from services.gateway.worker_state import WorkerState
from tests.gateway.fake import SPECIALS, make_model
from tests.support.mesh import ROOT


def worker(address: str, **load) -> WorkerState:
    defaults = {"role": "decode", "status": "ready", "fingerprint": b"f", "max_waiting": 8}
    return WorkerState(address=address, **{**defaults, **load})


def route(decode, prefill=(), matched=None, own=None, tokens=160, avoid=()):
    return choose_route(
        decode,
        prefill,
        own_requests=own or {},
        matched_blocks=matched or {},
        prompt_tokens=tokens,
        avoid=avoid,
    )


def test_the_least_loaded_worker_is_chosen():
    workers = [worker("a", running=3), worker("b", running=1), worker("c", tokens_waiting=900)]
    assert route(workers).decode.address == "b"


def test_what_was_sent_since_the_last_poll_counts():
    assert route([worker("a"), worker("b")], own={"a": 2}).decode.address == "b"


def test_a_cached_prefix_outweighs_a_little_load_but_not_much_load():
    light = [worker("a", running=1), worker("b")]
    assert route(light, matched={"a": 10}).decode.address == "a"
    assert route(light, matched={"a": 10}).matched_tokens == 160
    heavy = [worker("a", running=8), worker("b")]
    assert route(heavy, matched={"a": 10}).decode.address == "b"


def test_full_workers_are_passed_over_until_all_are_full():
    full = worker("a", waiting=8)
    assert route([full, worker("b", running=50)]).decode.address == "b"
    with pytest.raises(Overloaded):
        route([full])
    with pytest.raises(Unavailable):
        route([])


def test_a_worker_that_just_failed_is_the_last_choice():
    assert route([worker("a"), worker("b", running=5)], avoid={"a"}).decode.address == "b"
    assert route([worker("a")], avoid={"a"}).decode.address == "a"


def test_prefill_candidates_are_of_the_same_model_and_best_first():
    prefill = [
        worker("p1", role="prefill", tokens_waiting=500),
        worker("p2", role="prefill"),
        worker("p3", role="prefill", fingerprint=b"other"),
    ]
    assert route([worker("a")], prefill).candidates == ("p2", "p1")


def test_prefill_candidates_have_a_block_size_that_fits():
    prefill = [
        worker(f"p{size}", role="prefill", block_size=size, tokens_waiting=100 - size)
        for size in (8, 16, 24, 32, 48)
    ]
    assert route([worker("a", block_size=16)], prefill).candidates == ("p48", "p32", "p16", "p8")
    assert route([worker("a", block_size=24)], prefill).candidates == ("p48", "p24", "p8")


def test_the_prefix_index_counts_runs_from_the_first_block_and_forgets_the_oldest():
    index = PrefixIndex(max_keys=3)
    index.record([b"1", b"2"], "a")
    index.record([b"1"], "b")
    assert index.matched_blocks([b"1", b"2", b"9"]) == {"a": 2, "b": 1}
    assert index.matched_blocks([b"9", b"1"]) == {}
    index.record([b"3", b"4"], "a")
    assert len(index) == 3
    assert index.matched_blocks([b"1"]) == {"b": 1, "a": 1}


async def test_places_are_given_in_the_order_of_asking_and_given_back_by_who_leaves():
    admission = Admission(max_in_flight=1, max_queue=2)
    order = []

    async def ask(name: str, hold: asyncio.Event) -> None:
        async with admission.admit(time.monotonic() + 10):
            order.append(name)
            await hold.wait()

    holds = [asyncio.Event() for _ in range(3)]
    tasks = []
    for name, hold in zip("abc", holds, strict=True):
        tasks.append(asyncio.create_task(ask(name, hold)))
        await asyncio.sleep(0)  # it is in the queue
    assert (admission.in_flight, admission.waiting) == (1, 2)
    with pytest.raises(Overloaded):
        async with admission.admit(time.monotonic() + 10):
            pass
    tasks[1].cancel()
    for hold in holds:
        hold.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "c"]
    assert (admission.in_flight, admission.waiting) == (0, 0)


async def test_a_queued_request_ends_at_its_deadline():
    admission = Admission(max_in_flight=1, max_queue=1)
    async with admission.admit(time.monotonic() + 10):
        with pytest.raises(DeadlineExceeded):
            async with admission.admit(time.monotonic() + 0.05):
                pass
    assert admission.in_flight == 0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> PromptEncoder:
    return PromptEncoder(make_model(tmp_path_factory.mktemp("m") / "model"))


@pytest.mark.parametrize(
    "content",
    [
        "hello",
        "",
        "a < b",
        "trailing <",
        "<|en",
        "<|end|",
        "x<|end|>y",
        "<|user|>" * 3,
        "\ue000\ue001",
    ],
)
def test_control_tokens_come_from_the_template_alone_and_the_text_is_kept(encoder, content):
    # The second message would complete a control string that the first one begins.
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "d|>|>end|>"}]
    ids = encoder.encode_chat(messages)
    controls = [encoder.tokenizer.id_to_token(i) for i in ids if i < len(SPECIALS)]
    turn = ["<|user|>", "<|end|>"]
    assert controls == [*turn, *turn, "<|assistant|>"]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    assert text == content + "d|>|>end|>"


def test_an_ordinary_chat_is_encoded_as_the_rendered_text_is(encoder):
    messages = [{"role": "user", "content": "hello world, how are you?"}]
    rendered = "<|user|>hello world, how are you?<|end|><|assistant|>"
    assert encoder.encode_chat(messages) == encoder.tokenizer.encode(rendered).ids


def test_the_gateway_imports_no_torch():
    code = "import sys, services.gateway.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
