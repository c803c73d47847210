"""Offline generation: the engine of the services, in this process, behind vLLM's names."""

import itertools
import queue
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.engine import sequence as engine_sequence
from common.engine.config import EngineConfig
from common.engine.engine import Engine
from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest
from common.errors import CheckpointError, InvalidRequest
from common.text.detokenizer import IncrementalDecoder
from common.text.template import ChatTemplate

Prompt = str | Mapping[str, Any]

# Offline, prompts wait in this process anyway.
MAX_WAITING = 2**20


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or the token of stop_token_ids that ended it,
    None for the model's own end-of-sequence token; `finish_reason` is stop or length."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answer. `prompt` is None when token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class _Running:
    """A request under way. After a stop string it is `closed`: later tokens are dropped."""

    output: RequestOutput
    params: SamplingParams
    decoder: IncrementalDecoder | None
    pieces: list[str] = field(default_factory=list)
    closed: bool = False


class LLM:
    """A model folder, loaded once, that completes prompts.

    model             folder of a Hugging Face checkpoint; without a tokenizer it serves token ids
    dtype             auto | float32 | bfloat16
    quantization      None, or fp8 | fp8-block: quantize an unquantized checkpoint on load
    kv_cache_dtype    auto | float32 | bf16 | fp8_e4m3
    max_model_len     most tokens of a sequence; None: the model's limit, or what the cache holds
    num_blocks        KV blocks (num_gpu_blocks_override is vLLM's name for it); None: from
                      kv_cache_bytes
    seed              of requests that have none: request i of a call gets seed + i, so that a call
                      can be repeated; None: drawn at random
    threads           torch threads; None: torch's choice
    tensor_parallel_size  processes that compute together, this one among them

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
        max_num_batched_tokens: int = 512,
        num_gpu_blocks_override: int | None = None,
        num_blocks: int | None = None,
        kv_cache_bytes: int = 512 * 2**20,
        seed: int | None = None,
        device: str = "cpu",
        kernels: str = "auto",
        threads: int | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
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
            max_waiting=MAX_WAITING,
            prefix_caching=enable_prefix_caching,
            device=device,
            kernels=kernels,
            threads=threads,
            tensor_parallel=tensor_parallel_size,
        )
        self.seed = seed
        self.tokenizer = load_tokenizer(self.config.model)
        self.chat_template = ChatTemplate.from_folder(self.config.model)
        self._ids = itertools.count()
        self._steps: queue.SimpleQueue[list[engine_sequence.RequestOutput]] = queue.SimpleQueue()
        # The engine knows the queue only, not this object: an LLM can be garbage collected.
        self.engine = Engine(self.config, None, self._steps.put)
        self.engine.start()
        # Also at the interpreter's exit, before the threads are torn down.
        self._finalizer = weakref.finalize(self, self.engine.stop)

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
    ) -> list[RequestOutput]:
        """Completes prompts; the results are in their order.

        prompts          texts or {"prompt_token_ids": [...]}, one or a list
        sampling_params  one for all, or one for each

        Raises InvalidRequest before anything runs when one of them cannot be served.
        """
        several = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = self._params_for(several, sampling_params)
        runs = [self._prepare(p, prm) for p, prm in zip(several, params, strict=True)]
        return self._run(runs)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
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
        return self.generate(prompts, sampling_params)

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

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> _Running:
        text, ids = self._encode(prompt)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                f"stop strings need text, and {self.config.model} has no tokenizer.json; use "
                "stop_token_ids",
                field="stop",
            )
        decoder = None
        if self.tokenizer is not None:
            decoder = IncrementalDecoder(self.tokenizer, ids, stop=params.stop)
        request_id = str(next(self._ids))
        output = RequestOutput(request_id, text, ids, [CompletionOutput(0, "", [])])
        return _Running(output, params, decoder)

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

    def _run(self, runs: list[_Running]) -> list[RequestOutput]:
        """Submit all and collect until each has ended. Interrupted, it leaves nothing behind."""
        open_runs: dict[str, _Running] = {}
        try:
            for index, run in enumerate(runs):
                open_runs[run.output.request_id] = run
                self.engine.submit(self._request(run, index))
            while open_runs:
                for output in self._steps.get():
                    run = open_runs.get(output.request_id)
                    if run is not None:
                        self._take(run, output)
                        if output.finish_reason is not None:
                            del open_runs[output.request_id]
        finally:
            # Outputs of what is aborted here come in a later call, which knows no such id.
            for request_id in open_runs:
                self.engine.abort(request_id)
        return [run.output for run in runs]

    def _request(self, run: _Running, index: int) -> EngineRequest:
        params = run.params
        if params.seed is None and self.seed is not None:
            params = replace(params, seed=(self.seed + index) % 2**64)
        return EngineRequest(run.output.request_id, run.output.prompt_token_ids, params)

    def _take(self, run: _Running, output: engine_sequence.RequestOutput) -> None:
        if output.error is not None:
            raise output.error
        run.output.num_cached_tokens = output.cached_tokens
        if run.closed:
            return
        completion = run.output.outputs[0]
        stop_token = None
        if output.finish_reason == "stop":
            stop_token = output.token_ids[-1]
        self._take_tokens(run, output.token_ids, stop_token)
        if run.closed:
            if output.finish_reason is None:
                self.engine.abort(output.request_id)
            return
        if output.finish_reason is not None:
            completion.finish_reason = output.finish_reason
            if stop_token in run.params.stop_token_ids:
                completion.stop_reason = stop_token
            self._close_text(run)

    def _take_tokens(self, run: _Running, token_ids: Sequence[int], stop_token: int | None) -> None:
        """Tokens to text, up to a stop string. The token that ends a sequence has no text."""
        completion = run.output.outputs[0]
        for index, token in enumerate(token_ids):
            completion.token_ids.append(token)
            last = index == len(token_ids) - 1
            if run.decoder is None or (last and stop_token is not None):
                continue
            run.pieces.append(run.decoder.push((token,)))
            if run.decoder.stopped is not None:
                completion.finish_reason = "stop"
                completion.stop_reason = run.decoder.stopped
                completion.text = "".join(run.pieces)
                run.closed = True
                return

    def _close_text(self, run: _Running) -> None:
        completion = run.output.outputs[0]
        if run.decoder is not None:
            run.pieces.append(run.decoder.flush())
            if run.decoder.stopped is not None:
                completion.finish_reason = "stop"
                completion.stop_reason = run.decoder.stopped
        completion.text = "".join(run.pieces)


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


__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
