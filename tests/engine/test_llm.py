import functools
import json
import random
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from baton import LLM, SamplingParams
from baton.llm import GATHERED, _Steps
from common.engine.sequence import RequestOutput as EngineOutput
from common.errors import CheckpointError, InvalidRequest, Unavailable
from tests.engine.zoo import VOCAB, ZOO, checkpoint, expected_greedy, make_checkpoint
from tests.support.mesh import wait_until

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
LENGTHS = [1, 2, 15, 16, 17, 33, 47, 70]


def make_prompts(count, seed=0):
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB) for _ in range(LENGTHS[i % len(LENGTHS)])] for i in range(count)
    ]


@functools.cache
def expected(path, prompt):
    return expected_greedy(path, list(prompt), NEW_TOKENS)


def make_llm(path, **settings):
    return LLM(path, **{"threads": 1, "max_model_len": 160, **settings})


def given(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def answers(llm, prompts, params=GREEDY):
    return [result.outputs[0].token_ids for result in llm.generate(given(prompts), params)]


def wait_until_idle(llm, deadline_s=10.0):
    """All blocks come home once the last output was told."""

    def idle():
        state = llm.engine.state()
        return not (state.blocks_used or state.running or state.waiting)

    wait_until(idle, deadline_s, "the engine is idle")
    llm.engine._scheduler.check()
    assert llm.engine._scheduler.idle


# Tokens of transformers --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own"])
@pytest.mark.parametrize("arch", sorted(ZOO))
def test_greedy_tokens_are_those_of_transformers(arch, tied):
    """Block sizes 1, 16, 32; chunked and not; alone and among 32; with and without a hit."""
    path = checkpoint(arch, tied)
    checked = make_prompts(4, seed=1)[::-1]
    wanted = [expected(path, tuple(prompt)) for prompt in checked]
    crowd = checked + make_prompts(28, seed=2)
    for block_size, budget in ((1, 512), (16, 512), (32, 512), (16, 7)):
        with make_llm(path, block_size=block_size, max_num_batched_tokens=budget) as llm:
            assert answers(llm, crowd)[:4] == wanted
            for prompt, tokens in zip(checked, wanted, strict=True):
                (result,) = llm.generate(given([prompt]), GREEDY)
                assert result.outputs[0].token_ids == tokens
                # All but the last token of the prompt can be found, in whole blocks.
                assert result.num_cached_tokens == (len(prompt) - 1) // block_size * block_size
            wait_until_idle(llm)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own"])
def test_all_of_a_batch_of_32_are_those_of_transformers_alone_and_together(tied):
    path = checkpoint("llama", tied)
    prompts = make_prompts(32, seed=3)
    wanted = [expected(path, tuple(prompt)) for prompt in prompts]
    with make_llm(path, enable_prefix_caching=False) as llm:
        assert answers(llm, prompts) == wanted
        assert [answers(llm, [prompt])[0] for prompt in prompts[:8]] == wanted[:8]
        assert llm.engine.state().counters["prefix_hit_tokens"] == 0
        wait_until_idle(llm)


@pytest.mark.parametrize("arch", ["llama", "mistral_window", "qwen3"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_preemption_changes_no_token(arch, block_size):
    path = checkpoint(arch, False)
    prompts = make_prompts(6, seed=1)
    wanted = [expected(path, tuple(prompt)) for prompt in prompts]
    with make_llm(path, block_size=block_size, num_blocks=1 + 208 // block_size) as llm:
        assert answers(llm, prompts) == wanted
        assert llm.engine.state().counters["preemptions"] > 0
        wait_until_idle(llm)


@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "fp8_e4m3"])
def test_every_kv_dtype_gives_the_same_tokens_alone_and_together(kv_dtype):
    path = checkpoint("llama", False)
    prompts = make_prompts(8, seed=4)
    with make_llm(path, kv_cache_dtype=kv_dtype) as llm:
        together = answers(llm, prompts)
        assert [answers(llm, [prompt])[0] for prompt in prompts] == together
        wait_until_idle(llm)
    assert [len(tokens) for tokens in together] == [NEW_TOKENS] * 8
    if kv_dtype == "float32":
        assert together == [expected(path, tuple(prompt)) for prompt in prompts]


# Sampling ----------------------------------------------------------------------------------


def seeded(count):
    return [
        SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=i, max_tokens=40)
        for i in range(count)
    ]


def test_seeded_tokens_are_the_same_alone_together_and_after_preemption():
    path = checkpoint("llama", False)
    prompts = make_prompts(12, seed=5)
    with make_llm(path) as llm:
        together = answers(llm, prompts, seeded(12))
        alone = [
            answers(llm, [prompt], params)[0]
            for prompt, params in zip(prompts, seeded(12), strict=True)
        ]
    with make_llm(path, num_blocks=12) as llm:
        crowded = answers(llm, prompts, seeded(12))
        assert llm.engine.state().counters["preemptions"] > 0
        wait_until_idle(llm)
    assert together == alone == crowded
    assert len({tuple(tokens) for tokens in together}) == 12


def test_a_sequence_resumed_with_its_tokens_goes_on_with_the_same():
    prompt = make_prompts(8)[5]
    params = SamplingParams(temperature=1.0, seed=9, max_tokens=30, ignore_eos=True)
    rest = SamplingParams(temperature=1.0, seed=9, max_tokens=20, ignore_eos=True)
    with make_llm(checkpoint("llama", False)) as llm:
        (whole,) = answers(llm, [prompt], params)
        assert answers(llm, [prompt + whole[:10]], rest) == [whole[10:]]


def test_the_seed_of_the_llm_makes_calls_repeatable_and_prompts_differ():
    path, prompts = checkpoint("llama", False), [make_prompts(8)[5]] * 3
    params = SamplingParams(temperature=1.0, max_tokens=20)
    with make_llm(path, seed=1) as llm:
        first = answers(llm, prompts, params)
        assert answers(llm, prompts, params) == first
        assert first[0] != first[1]
    with make_llm(path) as llm:
        assert answers(llm, prompts, params) != answers(llm, prompts, params)


def test_min_tokens_puts_off_the_end():
    prompt = make_prompts(8)[4]
    path = checkpoint("llama", False)
    with make_llm(path) as llm:
        (free,) = answers(llm, [prompt])
        stop = (free[1],)
        (result,) = llm.generate(
            given([prompt]), SamplingParams(temperature=0, max_tokens=64, stop_token_ids=stop)
        )
        assert result.outputs[0].finish_reason == "stop"
        assert result.outputs[0].stop_reason == stop[0]
        late = SamplingParams(temperature=0, max_tokens=64, min_tokens=10, stop_token_ids=stop)
        (result,) = llm.generate(given([prompt]), late)
        tokens = result.outputs[0].token_ids
        assert len(tokens) > 10
        assert not {*stop, 2} & set(tokens[:10])


# The interface -----------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|s|>{{ m.role }}: {{ m.content }}<|e|>{% endfor %}<|s|>"


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A model with a tokenizer and a chat template; its texts are nonsense."""
    path = make_checkpoint("llama", True, tmp_path_factory.mktemp("text"), vocab_size=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|pad|>"), AddedToken("<|s|>"), AddedToken("<|e|>")],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog on the log"] * 3, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def test_texts_are_those_of_the_tokens(text_model):
    tokenizer = Tokenizer.from_file(str(text_model / "tokenizer.json"))
    prompts = ["the cat", "on the mat", "the dog é\U0001f600"]
    with make_llm(text_model) as llm:
        results = llm.generate(prompts, GREEDY)
        assert [result.prompt for result in results] == prompts
        for prompt, result in zip(prompts, results, strict=True):
            ids = tokenizer.encode(prompt).ids
            assert result.prompt_token_ids == ids
            assert result.outputs[0].token_ids == expected_greedy(text_model, ids, NEW_TOKENS)
            assert result.outputs[0].text == tokenizer.decode(result.outputs[0].token_ids)
            assert result.finished


def test_logprobs_have_texts_and_bad_words_are_not_said(text_model, capsys):
    tokenizer = Tokenizer.from_file(str(text_model / "tokenizer.json"))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    with make_llm(text_model) as llm:
        (result,) = llm.generate("the cat", params)
        (answer,) = result.outputs
        assert "output tokens/s" in capsys.readouterr().err
        said = [
            entry[t].decoded_token
            for t, entry in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
        for token, text in zip(answer.token_ids, said, strict=True):
            whole = tokenizer.decode([token], skip_special_tokens=False)
            assert text == whole
        word = next(
            text for text in said if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text
        )
        (other,) = llm.generate("the cat", replace(params, bad_words=word), use_tqdm=False)
        assert capsys.readouterr().err == ""
        assert other.outputs[0].token_ids != answer.token_ids
        assert word.strip() not in tokenizer.decode(other.outputs[0].token_ids).split()


def test_stop_strings_end_the_text_before_them(text_model):
    with make_llm(text_model) as llm:
        (whole,) = llm.generate("the cat", GREEDY)
        text = whole.outputs[0].text
        stop = text[20:23]
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, stop=stop)
        (result,) = llm.generate("the cat", params)
        completion = result.outputs[0]
        assert completion.text == text[: text.index(stop)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        count = len(completion.token_ids)
        assert completion.token_ids == whole.outputs[0].token_ids[:count]
        wait_until_idle(llm)


def test_chat_renders_the_models_template(text_model):
    tokenizer = Tokenizer.from_file(str(text_model / "tokenizer.json"))
    messages = [{"role": "user", "content": "the cat"}]
    with make_llm(text_model) as llm:
        (result,) = llm.chat(messages, GREEDY)
        assert result.prompt == "<|s|>user: the cat<|e|><|s|>"
        assert result.prompt_token_ids == tokenizer.encode(result.prompt).ids
        both = llm.chat([messages, messages], GREEDY)
        assert [r.outputs[0].token_ids for r in both] == [result.outputs[0].token_ids] * 2


def test_a_folder_without_a_tokenizer_serves_token_ids_only():
    with make_llm(checkpoint("llama", True)) as llm:
        (result,) = llm.generate({"prompt_token_ids": [5, 6]}, GREEDY)
        assert (result.prompt, result.outputs[0].text) == (None, "")
        with pytest.raises(InvalidRequest, match=r"no tokenizer\.json"):
            llm.generate("text", GREEDY)
        with pytest.raises(InvalidRequest, match="stop strings need text"):
            llm.generate({"prompt_token_ids": [5]}, SamplingParams(stop="x"))


def test_a_bad_prompt_is_refused_and_leaves_nothing_behind():
    with make_llm(checkpoint("llama", True)) as llm:
        for bad in ({"prompt_token_ids": [VOCAB]}, {"prompt_token_ids": []}, {}, 5):
            with pytest.raises(InvalidRequest):
                llm.generate([{"prompt_token_ids": [5]}, bad], GREEDY)
        with pytest.raises(InvalidRequest, match="2 sampling_params for 1 prompts"):
            llm.generate(given([[5]]), [GREEDY, GREEDY])
        wait_until_idle(llm)
        assert len(answers(llm, [[5, 6]])[0]) == NEW_TOKENS


def test_a_broken_tokenizer_file_is_named(text_model, tmp_path):
    for file in text_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        make_llm(tmp_path)


def test_a_closed_llm_refuses():
    llm = make_llm(checkpoint("llama", True))
    llm.close()
    llm.close()
    with pytest.raises(Unavailable):
        llm.generate(given([[5]]), GREEDY)


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch):
    with make_llm(checkpoint("llama", True)) as llm:
        take, seen = llm._take, []

        def interrupt(run, output):
            seen.append(output)
            if len(seen) == 5:
                raise KeyboardInterrupt
            take(run, output)

        monkeypatch.setattr(llm, "_take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(given(make_prompts(4)), GREEDY)
        monkeypatch.undo()
        wait_until_idle(llm)
        assert len(answers(llm, [[5, 6]])[0]) == NEW_TOKENS


def test_the_caller_is_woken_for_ends_and_for_many_tokens_not_for_each():
    steps, token, end = _Steps(), EngineOutput("a", (1,)), EngineOutput("b", (2,), "length")
    for _ in range(GATHERED - 1):
        steps.put([token])
    assert steps._queue.empty()
    steps.put([token])
    assert steps.get() == [token] * GATHERED
    steps.put([token])
    steps.put([token, end])
    assert steps.get() == [token, token, end]
    steps.at_once = True
    steps.put([token])
    assert steps.get() == [token]
