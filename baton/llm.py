"""Offline generation: the engine of the services, in this process, behind vLLM's names."""

import itertools
import logging
import queue
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from baton.outputs import CompletionOutput, Logprob, RequestOutput, logprob_dict
from common.engine import sequence as engine_sequence
from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.sampling_params import SamplingParams, choice_seed
from common.engine.sequence import EngineRequest
from common.engine.warm_up import warm_up_request
from common.errors import CheckpointError, InvalidRequest, UnusableLogits
from common.text.detokenizer import IncrementalDecoder
from common.text.template import ChatTemplate
from common.text.vocabulary import bad_word_ids

Prompt = str | Mapping[str, Any]
log = structlog.get_logger("llm")

# Requests in the engine beyond those that run: the next ones are at hand when one ends.
QUEUED = 16
# What one request can end by: a failure of the engine ends the call.
OWN_FAULTS = (UnusableLogits, InvalidRequest)
# Tokens that the caller's thread is woken for at a time: it takes a core from the step under way.
GATHERED = 64


@dataclass(slots=True)
class _Asked:
    """A prompt of a call, before and while it runs: `offset` is the number of answers that the
    call's earlier prompts have."""

    output: RequestOutput
    params: SamplingParams
    offset: int


@dataclass(slots=True)
class _Running:
    """An answer under way. After a stop string it is `closed`: later tokens are dropped. `others`
    of the same prompt wait for its first token, as they begin with the KV of its prompt."""

    asked: _Asked
    completion: CompletionOutput
    decoder: IncrementalDecoder | None = None
    pieces: list[str] = field(default_factory=list)
    closed: bool = False
    others: list[CompletionOutput] = field(default_factory=list)


class _Steps:
    """What the engine's steps gave, on its way to the thread that called `generate`.

    at_once  set by that thread where it has something to do for single tokens
    """

    def __init__(self) -> None:
        self.at_once = False
        self._gathered: list[engine_sequence.RequestOutput] = []
        self._queue: queue.SimpleQueue[list[engine_sequence.RequestOutput]] = queue.SimpleQueue()

    def put(self, outputs: list[engine_sequence.RequestOutput]) -> None:
        """From the engine's thread. Every end is handed on at once, with all that came before."""
        gathered = self._gathered
        gathered += outputs
        ended = any(output.finish_reason is not None for output in outputs)
        if ended or self.at_once or len(gathered) >= GATHERED:
            self._gathered = []
            self._queue.put(gathered)

    def get(self) -> list[engine_sequence.RequestOutput]:
        """Waits until there is something."""
        return self._queue.get()


class LLM:
    """A model folder, loaded once, that completes prompts. Its kernels are compiled, or found on
    disk, when the constructor returns.

    model             folder of a Hugging Face checkpoint; without a tokenizer it serves token ids
    dtype             auto | float32 | bfloat16
    quantization      None, or fp8 | fp8-block: quantize an unquantized checkpoint on load
    kv_cache_dtype    auto | float32 | bf16 | fp8_e4m3
    max_model_len     most tokens of a sequence; None: the model's limit, or what the cache holds
    num_blocks        KV blocks (num_gpu_blocks_override is vLLM's name for it); None: from
                      kv_cache_bytes
    seed              of requests that have none: answer i of a call, counted over its prompts, gets
                      seed + i, so that a call can be repeated; None: drawn at random
    threads           torch threads; None: torch's choice
    tensor_parallel_size  processes that compute together, this one among them
    batch_invariant   results do not depend, to the bit, on the rest of a step; slower
    rotate_qk         multiply Q and K by a Hadamard matrix: more exact FP8 KV where K has outliers
    fp8_attention     e4m3 products in the attention of prompts to FP8 KV: faster, less exact; GPUs

    Raises CheckpointError or ConfigError for what cannot be served.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 1024,
        num_gpu_blocks_override: int | None = None,
        num_blocks: int | None = None,
        kv_cache_bytes: int = 512 * 2**20,
        seed: int | None = None,
        device: str = "cpu",
        kernels: str = "auto",
        async_scheduling: bool | None = None,
        threads: int | None = None,
        tensor_parallel_size: int = 1,
        batch_invariant: bool = False,
        rotate_qk: bool = False,
        fp8_attention: bool = False,
    ) -> None:
        _log_to_stderr()
        self.config = EngineConfig(
            model=Path(model),
            dtype=dtype,
            quantization=quantization,
            kv_dtype=kv_cache_dtype,
            block_size=block_size,
            max_model_len=max_model_len,
            num_blocks=num_gpu_blocks_override if num_blocks is None else num_blocks,
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            # What an interrupted call left may still be on its way out.
            max_waiting=min(max_num_seqs + 2 * QUEUED, 2**20),
            prefix_caching=enable_prefix_caching,
            device=device,
            kernels=kernels,
            async_scheduling=async_scheduling,
            threads=threads,
            tensor_parallel=tensor_parallel_size,
            batch_invariant=batch_invariant,
            rotate_qk=rotate_qk,
            fp8_attention=fp8_attention,
        )
        self.seed = seed
        self.tokenizer = load_tokenizer(self.config.model)
        self.chat_template = ChatTemplate.from_folder(self.config.model)
        self._ids = itertools.count()
        self._steps = _Steps()
        # The engine knows the queue only, not this object: an LLM can be garbage collected.
        self.engine = Engine(self.config, None, self._steps.put)
        self.engine.start()
        # Also at the interpreter's exit, before the threads are torn down.
        self._finalizer = weakref.finalize(self, self.engine.stop)
        self._warm_up()

    def _warm_up(self) -> None:
        """One small request, so that no call waits for a compiler."""
        self.engine.submit(warm_up_request(self.engine.runner.max_model_len))
        ended = False
        while not ended:
            for output in self._steps.get():
                if output.error is not None:
                    self.close()
                    raise output.error
                ended = output.finish_reason is not None

    def close(self) -> None:
        """End the engine; the LLM is of no use afterwards. Done at exit otherwise."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; the results are in their order.

        prompts          texts or {"prompt_token_ids": [...]}, one or a list, of any length: the
                         engine holds max_num_seqs of them and a few more at a time
        sampling_params  one for all, or one for each
        use_tqdm         show a progress bar on stderr

        An answer whose logits are no numbers, or whose parameters turn out to leave no token to
        generate, ends there with an `error`; the others do not notice.

        Raises InvalidRequest before anything runs when one of them cannot be served, and another
        BatonError when the engine can run no more.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = self._params_for(several, sampling_params)
        offsets = itertools.accumulate((p.n for p in params), initial=0)
        asked = [
            self._prepare(prompt, wanted, offset)
            for prompt, wanted, offset in zip(several, params, offsets, strict=False)
        ]
        with tqdm(
            total=len(asked), desc="prompts", unit="", dynamic_ncols=True, disable=not use_tqdm
        ) as bar:
            self._run(asked, bar)
        return [one.output for one in asked]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of {"role", "content"}, or a list of conversations."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self._need_tokenizer()
        if self.chat_template is None:
            raise InvalidRequest(
                f"{self.config.model} has no chat template (chat_template.jinja, or chat_template "
                "in tokenizer_config.json); use generate with a prompt",
                field="messages",
            )
        prompts = []
        for conversation in conversations:
            text = self.chat_template.render(conversation, add_generation_prompt, tools)
            encoding = tokenizer.encode(text, add_special_tokens=ChatTemplate.add_special_tokens)
            prompts.append({"prompt": text, "prompt_token_ids": encoding.ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    # One call ------------------------------------------------------------------------------

    def _params_for(
        self,
        prompts: Sequence[Prompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * len(prompts)
        if len(given) != len(prompts):
            raise InvalidRequest(
                f"{len(given)} sampling_params for {len(prompts)} prompts; give one, or one each",
                field="sampling_params",
            )
        return list(given)

    def _prepare(self, prompt: Prompt, params: SamplingParams, offset: int) -> _Asked:
        """Everything that can be wrong with a prompt is seen here."""
        text, ids = self._encode(prompt)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                f"stop strings need text, and {self.config.model} has no tokenizer.json; use "
                "stop_token_ids",
                field="stop",
            )
        if params.bad_words:
            params = replace(params, bad_words=bad_word_ids(self.tokenizer, params.bad_words))
        told = None if params.prompt_logprobs is None else [None]
        asked = _Asked(
            RequestOutput(str(next(self._ids)), text, ids, prompt_logprobs=told), params, offset
        )
        asked.output.outputs += [self._completion(index, params) for index in range(params.n)]
        self.engine.check(self._request(asked, 0))
        return asked

    def _completion(self, index: int, params: SamplingParams) -> CompletionOutput:
        if params.logprobs is None:
            return CompletionOutput(index, "", [])
        return CompletionOutput(index, "", [], logprobs=[], cumulative_logprob=0.0)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, _encode_text(self._need_tokenizer(), prompt)
        if not isinstance(prompt, Mapping):
            raise InvalidRequest(
                f"a prompt is a text or {{'prompt_token_ids': [...]}}, not a "
                f"{type(prompt).__name__}",
                field="prompt",
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is not None:
            return text, list(ids)
        if not isinstance(text, str):
            raise InvalidRequest(
                f"a prompt needs 'prompt_token_ids' or 'prompt', has {sorted(prompt)}",
                field="prompt",
            )
        return text, _encode_text(self._need_tokenizer(), text)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{self.config.model} has no tokenizer.json; give prompt_token_ids", field="prompt"
            )
        return self.tokenizer

    def _run(self, asked: list[_Asked], bar: tqdm) -> None:
        """Have the engine answer all, so many at a time. Interrupted, it leaves nothing behind."""
        waiting = deque((one, one.output.outputs[0]) for one in asked)
        running: dict[str, _Running] = {}
        speed = _Speed(bar)
        # To stop at a text, or to begin with the prompt's other answers.
        self._steps.at_once = any(one.params.stop or one.params.n > 1 for one in asked)
        try:
            while waiting or running:
                while waiting and len(running) < self.config.max_num_seqs + QUEUED:
                    one, completion = waiting.popleft()
                    request = self._request(one, completion.index)
                    running[request.request_id] = self._start(one, completion)
                    self.engine.submit(request)
                for output in self._steps.get():
                    run = running.get(output.request_id)
                    if run is None:
                        continue
                    self._take(run, output)
                    if run.completion.token_ids or output.finish_reason is not None:
                        waiting.extendleft((run.asked, other) for other in reversed(run.others))
                        run.others = []
                    if output.finish_reason is not None:
                        del running[output.request_id]
                        speed.ended(run)
        finally:
            # Outputs of what is aborted here come in a later call, which knows no such id.
            for request_id in running:
                self.engine.abort(request_id)

    def _start(self, asked: _Asked, completion: CompletionOutput) -> _Running:
        run = _Running(asked, completion)
        if completion.index == 0:
            run.others = asked.output.outputs[1:]
        if self.tokenizer is not None:
            ids, stop = asked.output.prompt_token_ids, asked.params.stop
            run.decoder = IncrementalDecoder(self.tokenizer, ids, stop=stop)
        return run

    def _request(self, asked: _Asked, index: int) -> EngineRequest:
        params = asked.params
        seed = params.seed
        if seed is None and self.seed is not None:
            seed = choice_seed(self.seed, asked.offset)
        params = replace(
            params,
            n=1,
            seed=None if seed is None else choice_seed(seed, index),
            prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        )
        request_id = f"{asked.output.request_id}-{index}"
        return EngineRequest(request_id, asked.output.prompt_token_ids, params)

    def _take(self, run: _Running, output: engine_sequence.RequestOutput) -> None:
        if output.error is not None and not isinstance(output.error, OWN_FAULTS):
            raise output.error
        result = run.asked.output
        if run.completion.index == 0:
            result.num_cached_tokens = output.cached_tokens
        if result.prompt_logprobs is not None:
            told = output.prompt_logprobs
            result.prompt_logprobs += [logprob_dict(t, self.tokenizer) for t in told]
        if run.closed:
            return
        if output.error is not None:
            _close_text(run)
            run.completion.finish_reason, run.completion.error = "error", output.error
            log.warning("answer_failed", request=output.request_id, error=str(output.error))
            return
        stop_token = output.token_ids[-1] if output.finish_reason == "stop" else None
        self._take_tokens(run, output, stop_token)
        if run.closed:
            if output.finish_reason is None:
                self.engine.abort(output.request_id)
            return
        if output.finish_reason is not None:
            run.completion.finish_reason = output.finish_reason
            if stop_token in run.asked.params.stop_token_ids:
                run.completion.stop_reason = stop_token
            _close_text(run)

    def _take_tokens(
        self, run: _Running, output: engine_sequence.RequestOutput, stop_token: int | None
    ) -> None:
        """Tokens to text, up to a stop string. The token that ends a sequence has no text."""
        completion = run.completion
        for index, token in enumerate(output.token_ids):
            completion.token_ids.append(token)
            if completion.logprobs is not None:
                told = output.logprobs[index]
                completion.logprobs.append(logprob_dict(told, self.tokenizer))
                completion.cumulative_logprob += told.logprob
            last = index == len(output.token_ids) - 1
            if run.decoder is None or (last and stop_token is not None):
                continue
            run.pieces.append(run.decoder.push((token,)))
            if run.decoder.stopped is not None:
                _stop(run)
                completion.text = "".join(run.pieces)
                run.closed = True
                return


def _close_text(run: _Running) -> None:
    if run.decoder is not None:
        run.pieces.append(run.decoder.flush())
        if run.decoder.stopped is not None:
            _stop(run)
    run.completion.text = "".join(run.pieces)


def _stop(run: _Running) -> None:
    run.completion.finish_reason = "stop"
    run.completion.stop_reason = run.decoder.stopped if run.decoder is not None else None


class _Speed:
    """Tokens of ended answers over the time since the start, in a progress bar of prompts."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._began = time.monotonic()
        self._input = self._output = 0
        self._left: dict[str, int] = {}

    def ended(self, run: _Running) -> None:
        result = run.asked.output
        left = self._left.pop(result.request_id, len(result.outputs)) - 1
        self._output += len(run.completion.token_ids)
        if left:
            self._left[result.request_id] = left
            return
        self._input += len(result.prompt_token_ids)
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(
            f"{self._input / seconds:.0f} input, {self._output / seconds:.0f} output tokens/s",
            refresh=False,
        )
        self._bar.update()


def _log_to_stderr() -> None:
    """What a program prints is its own: warnings go to stderr, unless it has set up structlog."""
    if not structlog.is_configured():
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer.json; None when it has none. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path}: not a tokenizer file: {error}") from error


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt is not valid Unicode: {error}", field="prompt") from error
    return tokenizer.encode(text).ids


__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]
