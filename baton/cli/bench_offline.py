"""`baton bench throughput` and `baton bench latency`: `LLM` in this process, with the flags and the
JSON keys of `vllm bench`.

Prompts are random token ids and answers have exactly --output-len tokens (ignore_eos). The prefix
cache is off unless asked for.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.cli.locate import model_folder
from baton.llm import LLM
from common.engine.config import EngineConfig, ModelConfig
from common.engine.runner import TORCH_DTYPES, compute_dtype
from common.engine.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def throughput(argv: Sequence[str]) -> int:
    """Generate for --num-prompts prompts, the engine's queue always full; print and save rates."""
    parser = _parser("throughput", input_len=128, output_len=128)
    parser.add_argument("--num-prompts", type=_positive, default=256)
    parser.add_argument("--max-num-seqs", type=_positive, default=64, help="sequences in a step")
    args = parser.parse_args(argv)
    with _load(args, args.max_num_seqs) as llm:
        _generate(llm, args, _prompts(llm, args, 1, seed=-1), output_len=2)
        prompts = _prompts(llm, args, args.num_prompts, seed=args.seed)
        seconds = _generate(llm, args, prompts, args.output_len, use_tqdm=True)
    output = args.num_prompts * args.n * args.output_len
    total = output + args.num_prompts * args.input_len
    print(
        f"Throughput: {args.num_prompts / seconds:.2f} requests/s, {total / seconds:.2f} total "
        f"tokens/s, {output / seconds:.2f} output tokens/s"
    )
    _save(
        args.output_json,
        {
            "elapsed_time": seconds,
            "num_requests": args.num_prompts,
            "total_num_tokens": total,
            "requests_per_second": args.num_prompts / seconds,
            "tokens_per_second": total / seconds,
            "output_tokens_per_second": output / seconds,
        },
    )
    return 0


def latency(argv: Sequence[str]) -> int:
    """Time --num-iters batches of --batch-size prompts, one after the other.

    What the first token takes is timed by itself, so that the rest tells of decoding: its steps per
    second, times the bytes of the weights that each step reads, is the rate at which weights are
    read.
    """
    parser = _parser("latency", input_len=32, output_len=128)
    parser.add_argument("--batch-size", type=_positive, default=1)
    parser.add_argument("--num-iters-warmup", type=int, default=2)
    parser.add_argument("--num-iters", type=_positive, default=10)
    args = parser.parse_args(argv)
    answers = args.batch_size * args.n
    with _load(args, answers) as llm:
        prompts = _prompts(llm, args, args.batch_size, seed=args.seed)
        for _ in range(args.num_iters_warmup):
            _generate(llm, args, prompts, args.output_len)
        runs = range(args.num_iters)
        firsts = [_generate(llm, args, prompts, output_len=1) for _ in runs]
        seconds = [_generate(llm, args, prompts, args.output_len) for _ in runs]
        weights = weight_bytes(llm.config, llm.engine.runner.model_config)
    found = latency_figures(seconds, firsts, answers, args.output_len, weights)
    _print_latency(found)
    _save(args.output_json, found)
    return 0


def latency_figures(
    seconds: Sequence[float],
    firsts: Sequence[float],
    answers: int,
    output_len: int,
    weights: int,
) -> dict[str, Any]:
    """What is told of some batches.

    seconds  of each batch
    firsts   seconds of batches of one output token
    answers  of a batch
    weights  bytes of weights that a step reads
    """
    ordered = sorted(seconds)
    found: dict[str, Any] = {
        "avg_latency": statistics.fmean(seconds),
        "latencies": list(seconds),
        "percentiles": {
            str(p): ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES
        },
        "avg_first_token": statistics.fmean(firsts),
        "weight_bytes": weights,
    }
    # Medians: a machine that is shared has slow outliers.
    decoding = statistics.median(seconds) - statistics.median(firsts)
    if output_len > 1 and decoding > 0:
        steps_per_s = (output_len - 1) / decoding
        found["output_tokens_per_second"] = answers * steps_per_s
        found["weight_bytes_per_second"] = weights * steps_per_s
    return found


def weight_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes of the matrices that a decode step reads: one a weight where they are FP8, those of the
    compute dtype otherwise. Of an embedding that is not also the output matrix it reads a row."""
    embedding = model.vocab_size * model.hidden_size
    head = embedding
    tables = head if model.tie_word_embeddings else 2 * head
    item = TORCH_DTYPES[compute_dtype(config, model)].itemsize
    layers = model.num_parameters - tables
    return layers * (item if model.quantization is None else 1) + head * item


def _print_latency(found: dict[str, Any]) -> None:
    print(f"Avg latency: {found['avg_latency']:.4f} seconds")
    for name, value in found["percentiles"].items():
        print(f"{name}% percentile latency: {value:.4f} seconds")
    print(f"First token: {found['avg_first_token']:.4f} seconds")
    if "output_tokens_per_second" in found:
        print(
            f"Decoding: {found['output_tokens_per_second']:.2f} tokens/s, "
            f"{found['weight_bytes_per_second'] / 1e9:.2f} GB/s of weights "
            f"({found['weight_bytes'] / 1e9:.3f} GB a step)"
        )


def _parser(name: str, *, input_len: int, output_len: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"baton bench {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="PATH", help="model folder; the bundled one unless given")
    add("--input-len", type=_positive, default=input_len, help="tokens of a prompt")
    add("--output-len", type=_positive, default=output_len, help="tokens of an answer")
    add("--n", type=_positive, default=1, help="answers to a prompt")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of prompts and sampling")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--quantization", help="fp8 or fp8-block: quantize on load")
    add("--kv-cache-dtype", default="auto", help="auto, float32, bf16 or fp8_e4m3")
    add("--max-num-batched-tokens", type=_positive, default=1024, help="tokens in a step")
    add("--kv-cache-bytes", type=_positive, default=512 * 2**20, help="memory of the KV cache")
    add("--block-size", type=_positive, default=16, help="tokens in a KV block")
    add("--max-model-len", type=_positive, help="most tokens of a sequence")
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="reuse the KV of equal prompts",
    )
    add("--tensor-parallel-size", "-tp", type=_positive, default=1, help="processes")
    add("--device", default="cpu", help="torch device")
    add("--kernels", default="auto", help="backend of the operations")
    add("--threads", type=_positive, help="torch threads")
    add("--output-json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def _load(args: argparse.Namespace, max_num_seqs: int) -> LLM:
    return LLM(
        model_folder(args.model),
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(args.max_num_batched_tokens, max_num_seqs),
        kv_cache_bytes=args.kv_cache_bytes,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        enable_prefix_caching=args.enable_prefix_caching,
        tensor_parallel_size=args.tensor_parallel_size,
        device=args.device,
        kernels=args.kernels,
        threads=args.threads,
    )


def _prompts(llm: LLM, args: argparse.Namespace, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    vocab = llm.engine.runner.model_config.vocab_size
    return [
        {"prompt_token_ids": [rng.randrange(vocab) for _ in range(args.input_len)]}
        for _ in range(count)
    ]


def _generate(
    llm: LLM,
    args: argparse.Namespace,
    prompts: list[dict[str, Any]],
    output_len: int,
    *,
    use_tqdm: bool = False,
) -> float:
    """Seconds that it took."""
    params = SamplingParams(
        temperature=args.temperature,
        seed=args.seed,
        max_tokens=output_len,
        ignore_eos=True,
        n=args.n,
    )
    began = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - began
    for answer in (answer for result in results for answer in result.outputs):
        if answer.error is not None:  # fewer tokens than are counted
            raise answer.error
    return seconds


def _save(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
