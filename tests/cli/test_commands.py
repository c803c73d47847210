"""The `baton` command itself, offline generation, and clients without a server."""

import json

import pytest

from baton.cli.main import COMMANDS
from baton.cli.ports import any_free
from tests.cli.conftest import MODEL, baton

QUESTION = "codes: river=4821 stone=7733. What is the code of river?"


def test_without_a_command_the_list_of_commands_is_shown():
    shown = baton()
    assert shown.returncode == 2
    assert all(name in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "serve"])
def test_every_command_explains_itself(command):
    shown = baton(command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout


def test_an_unknown_command_is_refused():
    refused = baton("fly")
    assert refused.returncode == 2
    assert "fly" in refused.stderr


def test_generate_answers_offline_in_the_order_of_the_prompts():
    other = "codes: lamp=1957 cloud=3064. What is the code of lamp?"
    done = baton("generate", "--chat", "--temperature=0", f"--model={MODEL}", QUESTION, other)
    assert done.stdout == "4821\n1957\n", done.stderr
    assert "tokens/s" in done.stderr


def test_generate_reads_a_pipe_and_writes_json():
    done = baton("generate", "--chat", "--temperature=0", "--json", input=QUESTION)
    answer = json.loads(done.stdout)
    assert answer == {"prompt": QUESTION, "text": "4821", "finish_reason": "stop"}


def test_generate_does_not_say_a_bad_word():
    flags = ["--chat", "--temperature=0", "--frequency-penalty=0.1", "--bad-word=4821"]
    done = baton("generate", *flags, QUESTION)
    assert done.returncode == 0, done.stderr
    assert "4821" not in done.stdout


@pytest.mark.parametrize("flag", ["--quantization", "--kv-cache-dtype"])
def test_how_the_model_is_quantized_is_no_idle_flag(flag):
    refused = baton("generate", f"{flag}=int3", "hello")
    assert refused.returncode == 1
    assert "'int3'; set it to one of" in refused.stderr


def test_generate_without_a_prompt_is_refused():
    refused = baton("generate", input="")
    assert refused.returncode == 1
    assert "no prompt" in refused.stderr


def test_sampling_out_of_range_is_refused_before_anything_runs():
    refused = baton("generate", "--temperature=-1", "hello")
    assert refused.returncode == 1
    assert "temperature" in refused.stderr


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_without_a_server_the_remedy_is_named(command):
    refused = baton(command, f"--url=http://127.0.0.1:{any_free()}", "hello")
    assert refused.returncode == 1
    assert "baton up" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_url_without_a_scheme_is_refused():
    refused = baton("chat", "--url=localhost:8000", "hello")
    assert refused.returncode == 1
    assert "http://" in refused.stderr
