"""Train baton-tiny from nothing but a seed and write it as a Hugging Face Llama checkpoint.

    python tools/train_tiny.py --seed 0 --out models/baton-tiny

The data is generated while training (the questions of `baton.eval.tasks`, as conversations with
many turns), the tokenizer is trained on the same text, and the number of steps is fixed: the same
seed on the same machine and torch gives the same weights. docs/baton-tiny.md has the recipe's
reasons and the measured results.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_data import BEGIN, END, PAD, SPECIALS, Group, Rows, train_tokenizer
from tiny_model import FIRST_SHAPE, Llama, Shape, grow, seed_circuits
from tokenizers import Tokenizer
from torch import Tensor, nn

from baton.eval import tasks

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role in ("system", "developer") -%}{{- "<|system|>" -}}
{%- elif message.role == "assistant" -%}{{- "<|assistant|>" -}}
{%- else -%}{{- "<|user|>" -}}
{%- endif -%}
{{- text(message.content) -}}{{- "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: every step learns from all its groups."""

    steps: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Stage:
    """Phases under one learning rate schedule, with fresh optimizers, from bf16 weights.

    The rate would reach zero after `horizon` steps; a stage may stop before.
    """

    phases: tuple[Phase, ...]
    horizon: int
    shape: Shape = FIRST_SHAPE
    add_asks: tuple[str, ...] = tasks.ADD_ASKS


# "a + b = ?" puts the summands at another distance from the answer than the other wordings do. It
# made sums harder to learn, and only stage 0 has it.
FIRST_ADD_ASKS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "Compute {a} + {b}.")

# Short rows first: recall forms at 256 tokens and is then stretched to 2,048. Stages 1 and 2 drill
# sums, which need many more examples than anything else, beside the longest rows.
STAGES = (
    Stage(
        (
            Phase(1000, (Group(24, 256),)),
            Phase(600, (Group(8, 512), Group(10, 256))),
            Phase(655, (Group(3, 1024), Group(14, 256))),
        ),
        horizon=3500,
        add_asks=FIRST_ADD_ASKS,
    ),
    Stage(
        (Phase(275, (Group(1, 2048), Group(1, 1024), Group(3, 256), Group(20, 192, drill=True))),),
        horizon=1100,
    ),
    Stage(
        (Phase(850, (Group(1, 2048), Group(1, 1024), Group(2, 256), Group(20, 192, drill=True))),),
        horizon=850,
        shape=Shape(),
    ),
)

MUON_LR = 0.005
MUON_MOMENTUM = 0.95
ADAM_LR = 1.5e-3
WARMUP_STEPS = 100
DECAY_FRACTION = 0.5
CHECKPOINT_EVERY_S = 180.0


# ---------------------------------------------------------------- optimizer


def orthogonalize(g: Tensor) -> Tensor:
    """Newton-Schulz: g [n, out, in] to about its nearest semi-orthogonal matrices (Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g) / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


class Muon:
    """Muon for the layers' matrices, those of one shape as one batch."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            self.groups.setdefault(p.shape, []).append(p)
        self.momentum = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with Nesterov momentum, scaled so that every shape moves alike."""
        for shape, params in self.groups.items():
            grad = torch.stack([p.grad for p in params])
            m = self.momentum[shape].lerp_(grad, 1 - MUON_MOMENTUM)
            update = orthogonalize(grad.lerp(m, MUON_MOMENTUM))
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(params, list(update.unbind()), alpha=-scale)


# ---------------------------------------------------------------- training


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: warm up, stay, then fall in a line to zero."""
    decay = int(steps * DECAY_FRACTION)
    return min((step + 1) / WARMUP_STEPS, (steps - step) / decay, 1.0)


def loss_of(model: nn.Module, ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the answers' tokens, and how many of them are predicted right."""
    hidden = model(ids[:, :-1])
    target = answer[:, 1:]
    logits = F.linear(hidden[target], model.embed_tokens.weight).float()
    wanted = ids[:, 1:][target]
    return F.cross_entropy(logits, wanted, reduction="sum"), (logits.argmax(-1) == wanted).sum()


def accumulate(model: nn.Module, batches: list[tuple[Tensor, Tensor]], bf16: bool) -> str:
    """Gradients of the mean loss over all answers' tokens of the batches; returns loss and hits."""
    total = sum(int(answer[:, 1:].sum()) for _, answer in batches)
    report = []
    for ids, answer in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss, right = loss_of(model, ids, answer)
        (loss / total).backward()
        n = int(answer[:, 1:].sum())
        report.append(f"[{ids.shape[1] - 1}: {loss.item() / n:.4f} {right.item() / n:.4f}]")
    return " ".join(report)


def schedule(stage: Stage) -> Iterator[Phase]:
    """The phase of every step."""
    for phase in stage.phases:
        for _ in range(phase.steps):
            yield phase


class Log:
    """One line every 20 steps: the loss and hits of each group, and the speed."""

    def __init__(self) -> None:
        self.started = self.window = time.monotonic()
        self.tokens, self.seen = 0, 0

    def step(self, name: str, step: int, tokens: int, report: str) -> None:
        """Count a step and perhaps print."""
        self.tokens += tokens
        self.seen += tokens
        if step % 20:
            return
        now = time.monotonic()
        print(
            f"{name} step {step} {report} tok/s {self.seen / (now - self.window):.0f} "
            f"tokens {self.tokens / 1e6:.2f}M {now - self.started:.0f}s",
            flush=True,
        )
        self.window, self.seen = now, 0


def train(args: argparse.Namespace) -> None:
    """The whole run; exports to args.out every few minutes and at the end."""
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed, Shape.vocab)
    model = Llama(STAGES[0].shape)
    seed_circuits(model)
    log = Log()
    for index, stage in enumerate(STAGES):
        rows = Rows(tokenizer, f"baton-tiny train {args.seed + 1000 * index}", stage.add_asks)
        if index < args.first_stage:
            continue
        if index > 0:
            model = Llama(STAGES[index - 1].shape)
            load_exported(model, args.out)
        if stage.shape != model.shape:
            torch.manual_seed(args.seed + index)
            model = grow(model, stage.shape, rows.batch(Group(16, 256, drill=True))[0])
        train_stage(model, stage, rows, log, tokenizer, args)
        export(model, tokenizer, args.out)
    print(f"done: {log.tokens} tokens in {time.monotonic() - log.started:.0f} s", flush=True)


def train_stage(
    model: Llama,
    stage: Stage,
    rows: Rows,
    log: Log,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
) -> None:
    """All steps of one stage, with optimizers of its own."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    saved = time.monotonic()
    for step, phase in enumerate(schedule(stage)):
        batches = [rows.batch(group) for group in phase.groups]
        report = accumulate(model, batches, args.bf16)
        nn.utils.clip_grad_norm_(others, 1.0)
        share = rate(step, stage.horizon)
        muon.step(MUON_LR * share)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * share
        adam.step()
        model.zero_grad(set_to_none=True)
        log.step(f"stage {STAGES.index(stage)}", step, sum(i.numel() for i, _ in batches), report)
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            export(model, tokenizer, args.out)
            saved = time.monotonic()


def load_exported(model: Llama, folder: Path) -> None:
    """Take the weights of an exported checkpoint, so that a stage starts from what is on disk."""
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})


# ---------------------------------------------------------------- export


def export(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write a folder that transformers, vLLM and Baton load as a Llama."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": p.detach().to(torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
    }
    partial = out / "model.safetensors.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    _write_json(out / "config.json", model_config(model.shape, ids))
    _write_json(out / "generation_config.json", generation_config(ids))
    _write_json(out / "tokenizer_config.json", tokenizer_config(model.shape, ids))


def model_config(shape: Shape, ids: dict[str, int]) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": ids[BEGIN],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
        "torch_dtype": "bfloat16",
    }


def generation_config(ids: dict[str, int]) -> dict[str, object]:
    """generation_config.json: greedy, as every question has one answer."""
    return {
        "do_sample": False,
        "temperature": 0.0,
        "bos_token_id": ids[BEGIN],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def tokenizer_config(shape: Shape, ids: dict[str, int]) -> dict[str, object]:
    """tokenizer_config.json; the chat template is its own file beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
        "added_tokens_decoder": {
            str(i): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for text, i in ids.items()
        },
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description="Train baton-tiny from a seed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--first-stage", type=int, default=0, help="start here, from the checkpoint in --out"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
