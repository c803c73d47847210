"""`baton eval`: ask the held-out questions of a checkpoint or an endpoint, print the table.

    baton eval --model models/baton-tiny                   Baton's engine, in this process
    baton eval --model models/baton-tiny --backend transformers        the reference
    baton eval --url http://127.0.0.1:8000                 any endpoint that speaks OpenAI's API

The questions depend only on the seed and on the tokenizer that measures their length, so two
tables of the same seed compare the same questions.
"""

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.cli.locate import KEY_HELP, api_key, key_headers
from baton.eval import tasks
from baton.eval.tasks import CountTokens, Question
from common.errors import BatonError, CheckpointError, ConfigError, Unavailable

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
RECALL_CONTEXTS = (128, 512, 1000, 1500, 1900)
JSON_CONTEXTS = (128, 512)

# The longest answer (eight words reversed, a fact) is under 40 tokens of baton-tiny's.
MAX_ANSWER_TOKENS = 64

Answerer = Callable[[Sequence[Question]], list[str]]


@dataclass(frozen=True)
class Score:
    """One line of the table. `prompt_tokens` is the mean length of the prompts' text."""

    task: str
    context_tokens: int
    prompt_tokens: int
    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        """Share of answers that match exactly, 0 to 1."""
        return self.correct / self.questions


# ---------------------------------------------------------------- questions


def make_questions(
    count: int, seed: int, count_tokens: CountTokens, contexts: Iterable[int] = RECALL_CONTEXTS
) -> list[Question]:
    """`count` questions of every task and context length, each line from its own generator."""
    questions: list[Question] = []
    for context in contexts:
        rng = _generator(seed, "recall", context)
        questions += [tasks.recall(rng, context, count_tokens) for _ in range(count)]
    for context in JSON_CONTEXTS:
        rng = _generator(seed, "json", context)
        questions += [tasks.json_recall(rng, context, count_tokens) for _ in range(count)]
    for task in tasks.SHORT_TASKS:
        rng = _generator(seed, task, 0)
        questions += [tasks.short_question(rng, task) for _ in range(count)]
    return questions


def _generator(seed: int, task: str, context: int) -> random.Random:
    return random.Random(f"baton eval {seed} {task} {context}")


def score(
    questions: Sequence[Question], answers: Sequence[str], count_tokens: CountTokens
) -> list[Score]:
    """One Score for each task and context length, in the order of the questions."""
    lines: dict[tuple[str, int], list[tuple[bool, int]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        prompt = sum(count_tokens(message["content"]) for message in question.messages)
        line = lines.setdefault((question.task, question.context_tokens), [])
        line.append((answer.strip() == question.answer, prompt))
    return [
        Score(
            task=task,
            context_tokens=context,
            prompt_tokens=round(sum(prompt for _, prompt in line) / len(line)),
            correct=sum(right for right, _ in line),
            questions=len(line),
        )
        for (task, context), line in lines.items()
    ]


# ---------------------------------------------------------------- who answers


def token_counter(folder: Path) -> CountTokens:
    """Counts tokens with the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_needed(folder, "tokenizer.json")))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _needed(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; is {folder} a model folder?")
    return path


def prompt_encoder(folder: Path) -> Callable[[Question], list[int]]:
    """Renders a question with the folder's chat template and encodes it, ready to be answered."""
    from tokenizers import Tokenizer

    from common.text.template import ChatTemplate

    template = ChatTemplate.from_folder(folder)
    if template is None:
        raise CheckpointError(f"{folder} has no chat template, and baton eval asks in chats")
    tokenizer = Tokenizer.from_file(str(_needed(folder, "tokenizer.json")))
    return lambda question: (
        tokenizer.encode(template.render(list(question.messages)), add_special_tokens=False).ids
    )


def engine_answerer(model: Path, dtype: str, **settings: Any) -> Answerer:
    """Baton's own engine in this process, all questions at once. `settings` are LLM's."""
    from baton import LLM, SamplingParams

    encode = prompt_encoder(model)
    llm = LLM(str(model), dtype=dtype, **settings)

    def answer(questions: Sequence[Question]) -> list[str]:
        prompts = [{"prompt_token_ids": encode(question)} for question in questions]
        params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
        answers = [result.outputs[0] for result in llm.generate(prompts, params, use_tqdm=False)]
        for one in answers:
            if one.error is not None:
                raise one.error
        return [one.text for one in answers]

    return answer


def transformers_answerer(model: Path, dtype: str) -> Answerer:
    """The reference: Hugging Face transformers, one question at a time, greedy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def answer_one(question: Question) -> str:
        inputs = tokenizer.apply_chat_template(
            list(question.messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = llm.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return lambda questions: [answer_one(question) for question in questions]


def endpoint_answerer(
    url: str, model: str | None, key: str | None, concurrency: int, timeout_s: float
) -> Answerer:
    """An endpoint with /v1/chat/completions, `concurrency` requests at a time."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json"} | key_headers(key)
    name = model or _first_model(base, headers, timeout_s)

    def answer_one(question: Question) -> str:
        body = {
            "model": name,
            "messages": list(question.messages),
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
        }
        reply = _call(f"{base}/v1/chat/completions", headers, timeout_s, body)
        return reply["choices"][0]["message"]["content"] or ""

    def answer(questions: Sequence[Question]) -> list[str]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(answer_one, questions))

    return answer


def _first_model(base: str, headers: dict[str, str], timeout_s: float) -> str:
    models = _call(f"{base}/v1/models", headers, timeout_s)["data"]
    if not models:
        raise Unavailable(f"{base}/v1/models lists no model; name one with --served-name")
    return str(models[0]["id"])


def _call(
    url: str, headers: dict[str, str], timeout_s: float, body: dict[str, Any] | None = None
) -> Any:
    """The JSON that `url` answers; raises Unavailable with the endpoint's own words."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        words = error.read(2000).decode(errors="replace")
        raise Unavailable(f"{url} answered {error.code}: {words}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise Unavailable(f"{url} cannot be reached: {error}") from error


# ---------------------------------------------------------------- the table


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| task | context | prompt tokens | exact match | correct | n |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for s in scores:
        context = str(s.context_tokens) if s.context_tokens else "-"
        lines.append(
            f"| {s.task} | {context} | {s.prompt_tokens} | {s.accuracy:.1%} "
            f"| {s.correct} | {s.questions} |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `baton eval`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--model", type=Path, help=f"a model folder (default without --url: {BUNDLED_MODEL.name})"
    )
    where.add_argument("--url", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--backend",
        choices=("baton", "transformers"),
        default="baton",
        help="what runs --model (default: baton)",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of --model (default: bfloat16)")
    parser.add_argument("--quantization", help="of --model: fp8 or fp8-block, on load")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", help="of --model: auto, float32, bf16 or fp8_e4m3"
    )
    parser.add_argument("--served-name", help="the endpoint's model (default: its first)")
    parser.add_argument("--api-key", metavar="KEY", help=f"with --url: {KEY_HELP}")
    parser.add_argument("--concurrency", type=_positive, default=8, help="requests at a time")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for one request (default: 120)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="the folder whose tokenizer measures the contexts (default: the model's, "
        "with --url baton-tiny's)",
    )
    parser.add_argument(
        "--contexts",
        type=_contexts,
        default=RECALL_CONTEXTS,
        help="recall's context lengths (default: 128,512,1000,1500,1900)",
    )
    parser.add_argument("--questions", type=_positive, default=50, help="per line of the table")
    parser.add_argument("--seed", type=int, default=1, help="of the questions (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON lines, not a table")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _contexts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def run(args: argparse.Namespace) -> list[Score]:
    """Make the questions, have them answered, score them. Raises BatonError."""
    model = args.model or BUNDLED_MODEL
    if args.url and args.backend != "baton":
        raise ConfigError("--backend chooses what runs --model; with --url the endpoint runs it")
    count_tokens = token_counter(args.tokenizer or (BUNDLED_MODEL if args.url else model))
    questions = make_questions(args.questions, args.seed, count_tokens, args.contexts)
    answers = answerer(args, model)(questions)
    return score(questions, answers, count_tokens)


def answerer(args: argparse.Namespace, model: Path) -> Answerer:
    """Who answers, as the options say."""
    if args.url:
        return endpoint_answerer(
            args.url, args.served_name, api_key(args.api_key), args.concurrency, args.timeout
        )
    if args.backend == "transformers":
        return transformers_answerer(model, args.dtype)
    return engine_answerer(
        model, args.dtype, quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="baton eval", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        scores = run(args)
    except BatonError as error:
        print(f"baton eval: {error}", file=sys.stderr)
        return 1
    if args.json:
        for line in scores:
            print(json.dumps({**asdict(line), "accuracy": line.accuracy}))
    else:
        print(table(scores))
        print(f"\nseed {args.seed}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
