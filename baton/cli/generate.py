"""`baton generate`: complete prompts, with a model folder in this process or with an endpoint."""

import argparse
import json
import sys
import time

from baton.cli.locate import KEY_HELP, api_key, endpoint, model_folder
from baton.cli.sampling import add_sampling, sampling_fields
from baton.cli.stream import Endpoint
from common.errors import InvalidRequest


def main(argv: list[str]) -> int:
    """Texts on stdout in the order of the prompts, speed on stderr."""
    args = _parser().parse_args(argv)
    prompts = args.prompt or ([] if sys.stdin.isatty() else [sys.stdin.read().rstrip("\n")])
    if not prompts or not all(prompts):
        raise InvalidRequest("no prompt; give it as an argument or on stdin", field="prompt")
    if args.url:
        return _online(args, prompts)
    return _offline(args, prompts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton generate",
        description="Complete prompts as they are (--chat: answer them through the model's chat "
        "template). Without --url the model runs in this process.",
    )
    add = parser.add_argument
    add("prompt", nargs="*", help="one or several; may also come on stdin")
    add("--model", metavar="PATH", help="model folder, or with --url the model's name there")
    add("--url", help="use this endpoint")
    add("--api-key", metavar="KEY", help=f"with --url: {KEY_HELP}")
    add("--chat", action="store_true", help="send each prompt as a user's message")
    add("--dtype", default="auto", help="offline: auto, float32 or bfloat16")
    add("--quantization", help="offline: fp8 or fp8-block, quantize on load")
    add("--kv-cache-dtype", default="auto", help="offline: auto, float32, bf16 or fp8_e4m3")
    add("--max-model-len", type=int, help="offline: most tokens of a sequence")
    add("--device", default="cpu", help="offline: torch device")
    add("--json", action="store_true", help="one JSON object a line")
    add_sampling(parser)
    return parser


def _print(args: argparse.Namespace, prompt: str, text: str, reason: str | None) -> None:
    if args.json:
        print(json.dumps({"prompt": prompt, "text": text, "finish_reason": reason}))
    else:
        print(text)


def _offline(args: argparse.Namespace, prompts: list[str]) -> int:
    folder = model_folder(args.model)
    from baton import LLM, SamplingParams  # loads torch: only where it is needed

    # As the endpoint does: a completion is 16 tokens unless asked, a chat answer ends by itself.
    fields = ({"max_tokens": None} if args.chat else {}) | sampling_fields(args)
    params = SamplingParams(**fields)
    with LLM(
        folder,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        device=args.device,
    ) as llm:
        began = time.monotonic()
        bar = len(prompts) > 1 and sys.stderr.isatty()
        if args.chat:
            chats = [[{"role": "user", "content": p}] for p in prompts]
            results = llm.chat(chats, params, use_tqdm=bar)
        else:
            results = llm.generate(prompts, params, use_tqdm=bar)
        seconds = time.monotonic() - began
    for prompt, result in zip(prompts, results, strict=True):
        _print(args, prompt, result.outputs[0].text, result.outputs[0].finish_reason)
    tokens = sum(len(r.outputs[0].token_ids) for r in results)
    rate = tokens / seconds if seconds else 0.0
    print(f"({tokens} tokens in {seconds:.2f} s, {rate:.1f} tokens/s)", file=sys.stderr)
    return int(any(result.outputs[0].error is not None for result in results))  # warned of already


def _online(args: argparse.Namespace, prompts: list[str]) -> int:
    server = Endpoint(endpoint(args.url), api_key(args.api_key))
    try:
        model = args.model or server.first_model()
        for prompt in prompts:
            path, body = _request(args, model, prompt)
            text, speed = server.stream(path, body, lambda _: None)
            _print(args, prompt, text, speed.finish_reason)
            print(f"({speed})", file=sys.stderr)
    finally:
        server.close()
    return 0


def _request(args: argparse.Namespace, model: str, prompt: str) -> tuple[str, dict[str, object]]:
    fields = {"model": model, **sampling_fields(args)}
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {"messages": messages, **fields}
    return "/v1/completions", {"prompt": prompt, **fields}
