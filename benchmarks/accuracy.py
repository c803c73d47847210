"""What FP8 costs in accuracy: the table of docs/accuracy.md.

    python benchmarks/accuracy.py [--questions 50] [--only TEXT]

Exact match: `baton eval`'s questions, answered greedily by models/baton-tiny. KL divergence: of the
next-token distributions from those of the unquantized float32 model by transformers, in millinats
(1e-3 nats), mean over tokens: for baton-tiny those of right answers to other questions, for the
random-weight checkpoints of tests/engine/zoo.py (five architectures) random ones. Needs a checkout
and a quarter of an hour on two cores.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from baton.eval import run as evaluation  # noqa: E402
from baton.eval.tasks import Question  # noqa: E402
from common.engine.config import EngineConfig  # noqa: E402
from common.engine.quantization.calibrate import calibrate  # noqa: E402
from common.engine.quantization.write import write_quantized  # noqa: E402
from common.engine.runner import ModelRunner  # noqa: E402
from tests.engine import zoo  # noqa: E402
from tests.engine.driving import make_batch  # noqa: E402

TINY = evaluation.BUNDLED_MODEL
# Of the questions that calibrate; those that are asked have the seed 1.
CALIBRATION_SEED = 2
ZOO_PROMPTS = 4
ZOO_TOKENS = 200
TINY_QUESTIONS = 4  # of each kind


@dataclass(frozen=True)
class Row:
    """One line of the table: a scheme to write with (None: the checkpoint as it is), settings."""

    name: str
    kv: str
    scheme: str | None = None
    static_kv: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = [
    Row("bf16", "bf16"),
    Row("fp8 (on load), fp8-dynamic", "bf16", settings={"quantization": "fp8"}),
    Row("fp8-block (also on load)", "bf16", settings={"quantization": "fp8-block"}),
    Row("fp8-static", "bf16", "fp8-static"),
    Row("bf16", "fp8_e4m3"),
    Row("bf16", "fp8_e4m3, Q and K rotated", settings={"rotate_qk": True}),
    Row(
        "bf16", "fp8_e4m3, e4m3 products", settings={"fp8_attention": True, "kernels": "reference"}
    ),
    Row("fp8 (on load), fp8-dynamic", "fp8_e4m3", settings={"quantization": "fp8"}),
    Row("fp8-block (also on load)", "fp8_e4m3", settings={"quantization": "fp8-block"}),
    Row("fp8-static", "fp8_e4m3", "fp8-static"),
    Row("fp8-static", "fp8_e4m3, static scales", "fp8-static", static_kv=True),
]


@dataclass(frozen=True)
class Result:
    correct: int
    questions: int
    tiny_kl: float
    zoo_kl: float


@dataclass(frozen=True)
class Text:
    """Tokens, the reference's logits of each, and the first whose logits count."""

    token_ids: list[int]
    wanted: torch.Tensor
    first: int = 0


def folder_of(row: Row, source: Path, prompts: Sequence[Sequence[int]], base: Path) -> Path:
    """The row's checkpoint, written where it must be."""
    if row.scheme is None:
        return source
    target = base / f"{row.scheme}-{row.static_kv}-{source.name}"
    if not target.exists():
        found = calibrate(source, prompts, kv=row.static_kv)
        write_quantized(source, target, row.scheme, found)
    return target


def divergence(folder: Path, row: Row, texts: Sequence["Text"]) -> float:
    """Mean KL divergence in nats over the texts' tokens that count."""
    longest = max(len(text.token_ids) for text in texts)
    runner = ModelRunner(
        EngineConfig(
            model=folder,
            dtype="bfloat16",
            kv_dtype=row.kv.split(",")[0],
            num_blocks=2 + longest // 16,
            max_model_len=longest,
            max_num_batched_tokens=longest,
            **row.settings,
        )
    )
    table = list(range(1, 2 + (longest - 1) // 16))
    total, count = 0.0, 0
    for text in texts:
        got = runner.forward(make_batch([(text.token_ids, 0, table)], 16, all_rows=True))
        p = text.wanted[text.first :].double().log_softmax(-1)
        q = got[text.first :].double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        count += len(p)
    return total / count


def zoo_divergence(row: Row, base: Path) -> float:
    """Mean over the architectures."""
    prompts = [zoo.random_prompt(ZOO_TOKENS, seed=100 + i) for i in range(ZOO_PROMPTS)]
    calibration = [zoo.random_prompt(ZOO_TOKENS, seed=i) for i in range(ZOO_PROMPTS)]
    found = []
    for arch in zoo.ARCHITECTURES:
        source = zoo.checkpoint(arch, False)
        texts = [Text(prompt, zoo.expected_logits(source, prompt)) for prompt in prompts]
        found.append(divergence(folder_of(row, source, calibration, base), row, texts))
    return sum(found) / len(found)


def answers(questions: Sequence[Question]) -> list[Text]:
    """The questions with their right answers, of which alone the logits count."""
    encode = evaluation.prompt_encoder(TINY)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    texts = []
    for question in questions:
        prompt = encode(question)
        answer = tokenizer.encode(question.answer, add_special_tokens=False).ids
        whole = prompt + answer
        texts.append(Text(whole, zoo.expected_logits(TINY, whole), len(prompt) - 1))
    return texts


def measure(count: int, rows: Sequence[Row]) -> Iterator[tuple[Row, Result]]:
    tokens = evaluation.token_counter(TINY)
    encode = evaluation.prompt_encoder(TINY)
    questions = evaluation.make_questions(count, 1, tokens)
    calibration = [encode(q) for q in evaluation.make_questions(4, CALIBRATION_SEED, tokens)]
    texts = answers(evaluation.make_questions(TINY_QUESTIONS, CALIBRATION_SEED + 1, tokens))
    with tempfile.TemporaryDirectory(prefix="baton-accuracy-") as name:
        base = Path(name)
        for row in rows:
            folder = folder_of(row, TINY, calibration, base)
            answer = evaluation.engine_answerer(
                folder, "bfloat16", kv_cache_dtype=row.kv.split(",")[0], **row.settings
            )
            scores = evaluation.score(questions, answer(questions), tokens)
            tiny = divergence(folder, row, texts)
            correct = sum(s.correct for s in scores)
            yield row, Result(correct, len(questions), tiny, zoo_divergence(row, base))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=50, help="of each of 12 kinds")
    parser.add_argument("--only", default="", help="rows with this in their text, and bf16's")
    options = parser.parse_args()
    rows = [ROWS[0], *(row for row in ROWS[1:] if options.only in f"{row.name} | {row.kv}")]
    began = time.monotonic()
    print("| weights and activations | KV cache | correct | exact match | of bf16's "
          "| KL, baton-tiny | KL, random weights |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|")
    base = None
    for row, result in measure(options.questions, rows):
        base = base or result.correct
        print(
            f"| {row.name} | {row.kv} | {result.correct} / {result.questions} "
            f"| {result.correct / result.questions:.1%} | {result.correct / base:.1%} "
            f"| {result.tiny_kl * 1e3:.2f} | {result.zoo_kl * 1e3:.2f} |",
            flush=True,
        )
    print(
        f"\n{datetime.date.today()}, baton {version('baton')}, torch {torch.__version__}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}, "
        f"{time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
