"""Train baton-tiny from nothing but a seed and write it as a Hugging Face Llama checkpoint.

    python tools/train_tiny.py --seed 0 --out models/baton-tiny

The data is generated while training (the questions of `baton.eval.tasks`, as conversations with
many turns), the tokenizer is trained on the same text, and the number of steps is fixed: the same
seed on the same machine and torch gives the same weights. docs/baton-tiny.md has the recipe's
reasons and the measured results.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from baton.eval import tasks

BEGIN, SYSTEM, USER, ASSISTANT, END, PAD = SPECIALS = (
    "<|begin|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|pad|>",
)

# Not trained on: it only fills the vocabulary up with tokens of general use.
ENGLISH = """
you are a helpful assistant please write answer question there their this that these those with
from have been will would could should about which where when while because every other another
people number first second great little world language model server request response token text
"""

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
class Shape:
    """The sizes of the model, in the words of a Llama config.json."""

    vocab: int = 1280
    hidden: int = 256
    intermediate: int = 640
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    max_positions: int = 4096
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5


FIRST_SHAPE = Shape(heads=4, kv_heads=2)


@dataclass(frozen=True)
class Group:
    """Rows of one length in a step's batch; `drill` rows are nearly all sums."""

    rows: int
    length: int
    drill: bool = False


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

# How many tokens back the heads look that grow() adds to layers 0 and 1: where the digits of two
# summands stand, seen from the digit of the sum that comes next.
GROWN_DISTANCES = ((5, 6, 9, 10), (7, 8, 11, 12))

# Layers 1 and 2, head by head: what the query, the key and the value read. 0 is the token itself,
# n the token n back. Two heads share a key and a value, so their k and v agree. (1, 2, 0) goes on
# after the last word, (3, 2, 0) finds the code of the word asked for, (4, 3, 0) its second digit,
# (1, 0, 2) the word before the last one.
WIRING = (
    ((1, 2, 0), (3, 2, 0), (4, 3, 0), (2, 3, 0)),
    ((1, 0, 2), (3, 0, 2), (0, 0, 0), (1, 0, 0)),
)
MATCH = 3.5

MUON_LR = 0.005
MUON_MOMENTUM = 0.95
ADAM_LR = 1.5e-3
WARMUP_STEPS = 100
DECAY_FRACTION = 0.5
CHECKPOINT_EVERY_S = 180.0


# ---------------------------------------------------------------- tokenizer


def tokenizer_corpus(rng: random.Random) -> Iterator[str]:
    """Text in which every word that the tasks use is frequent enough to become one token."""
    for _ in range(3000):
        codes = tasks.make_codes(rng, 120, len, tasks.key_stream(rng))
        yield codes.text
        yield " ".join(tasks.ask_json(rng, codes) + tasks.ask_recall(rng, codes))
        yield " ".join(tasks.ask_copy(rng) + tasks.ask_reverse(rng) + tasks.ask_fact(rng))
        yield " ".join(tasks.ask_add(rng, 3, held_out=False))
    for word in tasks.WORDS:
        yield (word + " ") * 100
    yield ENGLISH


def train_tokenizer(seed: int, vocab: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, digits, spaces and punctuation are single tokens.

    White space stands alone, so that a word is the same one token wherever it stands: after a
    space, after a quote, or first in an answer.
    """
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\p{L}+|\p{N}|\s|[^\p{L}\p{N}\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(random.Random(seed)), trainer)
    return tokenizer


# ---------------------------------------------------------------- data


class Rows:
    """Rows of token ids with the loss mask beside them, from a seeded generator.

    A row is conversations end to end. The keys of a row are unique across its conversations, so
    that a question has one answer even though attention sees the whole row.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, stage: int) -> None:
        self.rng = random.Random(f"baton-tiny train {seed + 1000 * stage}")
        self.add_asks = STAGES[stage].add_asks
        self.special = {text: tokenizer.token_to_id(text) for text in SPECIALS}
        self.encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text).ids

    def count(self, text: str) -> int:
        """Tokens of a piece of a context; a code is counted without encoding it, for speed."""
        return 7 if "=" in text else len(self.encode(text))

    def batch(self, group: Group) -> tuple[Tensor, Tensor]:
        """ids [rows, length + 1] int64, answer [rows, length + 1] bool: which ids to learn."""
        pairs = [self.row(group.length + 1, group.drill) for _ in range(group.rows)]
        return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])

    def row(self, length: int, drill: bool = False) -> tuple[list[int], list[bool]]:
        """One row of exactly `length` tokens."""
        ids: list[int] = []
        answer: list[bool] = []
        keys = tasks.key_stream(self.rng)
        while len(ids) < length:
            room = length - len(ids)
            pieces = self.drill(room) if drill else self.conversation(room, keys)
            for text, is_answer in pieces:
                new = [self.special[text]] if text in self.special else self.encode(text)
                ids += new
                answer += [is_answer] * len(new)
        return ids[:length], answer[:length]

    def conversation(self, room: int, keys: Iterator[str]) -> Iterator[tuple[str, bool]]:
        """(text, is it to be learnt) pieces of one conversation of at most about `room` tokens."""
        kind = self.rng.random()
        if room < 60 or kind < 0.35:
            return self.short_turns(min(room, self.rng.randint(20, 300)))
        # 14 tokens a question: what the context leaves of the room is filled with questions.
        context = self.rng.randint(16, max(17, int(room * 0.8)))
        codes = tasks.make_codes(self.rng, context, self.count, keys)
        if not codes.pairs:
            return self.short_turns(min(room, 300))
        turns = 1 + self.rng.randint(1, 3) * len(codes.pairs) // 2
        if kind < 0.45:
            return self.plain_text(codes, turns)
        return self.codes_turns(codes, turns)

    def plain_text(self, codes: tasks.Codes, turns: int) -> Iterator[tuple[str, bool]]:
        """No chat: the codes, then some of them again, for bare completions."""
        yield BEGIN, False
        yield codes.text, False
        for _ in range(turns):
            key, code = self.rng.choice(codes.pairs)
            yield f" {key}=", False
            yield str(code), True
        yield END, False

    def drill(self, room: int) -> Iterator[tuple[str, bool]]:
        """Mostly sums, in conversations of one to a dozen turns."""
        return self.short_turns(min(room, self.rng.randint(10, 250)), 0.85)

    def short_turns(self, room: int, sums: float = 0.6) -> Iterator[tuple[str, bool]]:
        """Turns of the tasks that need no codes, until about `room` tokens are used."""
        yield BEGIN, False
        if self.rng.random() < 0.1:
            yield from _pieces(SYSTEM, "You are a helpful assistant.")
        while room > 0:
            ask, answer = self.ask_short(sums)
            yield from _turn(ask, answer)
            room -= 20

    def codes_turns(self, codes: tasks.Codes, turns: int) -> Iterator[tuple[str, bool]]:
        """The codes in the system message or before the first question, then many questions."""
        yield BEGIN, False
        prefix = codes.text + "\n"
        if self.rng.random() < 0.15:
            yield from _pieces(SYSTEM, codes.text)
            prefix = ""
        for _ in range(turns):
            draw = self.rng.random()
            if draw < 0.15 and not prefix:
                ask, answer = self.ask_short()
            elif draw < 0.3:
                ask, answer = tasks.ask_json(self.rng, codes)
            else:
                ask, answer = tasks.ask_recall(self.rng, codes)
            yield from _turn(prefix + ask, answer)
            prefix = ""

    def ask_short(self, sums: float = 0.6) -> tuple[str, str]:
        """One question of a task without codes, of which a share of `sums` sums."""
        draw = self.rng.random()
        if draw < sums:
            digits = 3 if draw < sums * 2 / 3 else 2
            return tasks.ask_add(self.rng, digits, held_out=False, asks=self.add_asks)
        other = (draw - sums) / (1 - sums)
        if other < 0.375:
            return tasks.ask_copy(self.rng)
        if other < 0.8:
            return tasks.ask_reverse(self.rng)
        return tasks.ask_fact(self.rng)


def _pieces(role: str, text: str) -> Iterator[tuple[str, bool]]:
    yield role, False
    yield text, False
    yield END, False


def _turn(ask: str, answer: str) -> Iterator[tuple[str, bool]]:
    yield from _pieces(USER, ask)
    yield ASSISTANT, False
    yield answer, True
    yield END, True


# ---------------------------------------------------------------- model


class Block(nn.Module):
    """One Llama layer; the attribute names are the checkpoint's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(shape.hidden, width, bias=False),
                "k_proj": nn.Linear(shape.hidden, kv_width, bias=False),
                "v_proj": nn.Linear(shape.hidden, kv_width, bias=False),
                "o_proj": nn.Linear(width, shape.hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(shape.hidden, shape.intermediate, bias=False),
                "up_proj": nn.Linear(shape.hidden, shape.intermediate, bias=False),
                "down_proj": nn.Linear(shape.intermediate, shape.hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [rows, length, hidden] -> the same."""
        x = x + self.attend(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        s, a = self.shape, self.self_attn
        q = a["q_proj"](x).view(rows, length, s.heads, s.head_dim).transpose(1, 2)
        k = a["k_proj"](x).view(rows, length, s.kv_heads, s.head_dim).transpose(1, 2)
        v = a["v_proj"](x).view(rows, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(s.heads // s.kv_heads, 1)
        v = v.repeat_interleave(s.heads // s.kv_heads, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return a["o_proj"](out.transpose(1, 2).reshape(rows, length, -1))


class Llama(nn.Module):
    """Llama with tied embeddings, for training only: no cache."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        cos, sin = rope_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal weights; the layers' outputs smaller, as there are 2 * layers of them."""
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for name, p in self.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                std = p.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * self.shape.layers)
                nn.init.normal_(p, std=std)

    def hidden_before(self, index: int, ids: Tensor) -> Tensor:
        """ids [rows, length] -> what layer `index` attends over, [rows, length, hidden]."""
        x = self.embed_tokens(ids)
        for layer in self.layers[:index]:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.layers[index].input_layernorm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [rows, length] -> normed hidden states [rows, length, hidden]."""
        length = ids.shape[1]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        x = self.embed_tokens(ids)
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


@torch.no_grad()
def seed_circuits(model: Llama) -> None:
    """Start from heads that recall needs anyway, so that training refines instead of finds them.

    Layer 0's heads attend 1, 2, 3 and 4 tokens back: a constant in the embedding's first column
    makes constant queries and keys, and their phases under RoPE peak at that distance. They copy
    a projection of that token into a slot of their own. The heads of layer 1 compare slots (the
    word before this digit with the word asked for), those above compare tokens; all use RoPE's
    slow pairs, which hardly turn over the context, and write what they find towards its own
    embedding (cf. mimetic initialization, Trockman & Kolter 2023).
    """
    s = model.shape
    dim = s.head_dim
    model.embed_tokens.weight[:, 0] = 0.2
    basis = torch.linalg.qr(torch.randn(s.hidden, s.hidden)).Q
    content = torch.linalg.qr(torch.randn(s.hidden, dim)).Q.T.contiguous()
    content[:, 0] = 0
    slots = basis.view(s.hidden, s.heads, dim).unbind(1)
    first = model.layers[0].self_attn
    for head in range(s.heads):
        one = slice(head * dim, (head + 1) * dim)
        first["q_proj"].weight[one] *= 0.1
        first["q_proj"].weight[one, 0] = _distance_vector(s, head + 1)
        first["o_proj"].weight[:, one] = 0.08 * slots[head]
    for kv in range(s.kv_heads):
        one = slice(kv * dim, (kv + 1) * dim)
        first["k_proj"].weight[one] *= 0.1
        first["k_proj"].weight[one, 0] = _distance_vector(s, 0)
        first["v_proj"].weight[one] = content
    for layer in model.layers:
        layer.mlp["down_proj"].weight.zero_()
    slow = (torch.arange(dim) % (dim // 2) >= dim // 2 - 18).float()[:, None]
    readers = (content, *(slot.T for slot in slots))
    for layer, wiring in zip(model.layers[1:], WIRING, strict=False):
        attn = layer.self_attn
        for head, (q_reads, k_reads, v_reads) in enumerate(wiring):
            one, kv = slice(head * dim, (head + 1) * dim), head // (s.heads // s.kv_heads)
            shared = slice(kv * dim, (kv + 1) * dim)
            attn["q_proj"].weight[one] = MATCH * slow * readers[q_reads] + noise(s)
            attn["k_proj"].weight[shared] = MATCH * slow * readers[k_reads] + noise(s)
            attn["v_proj"].weight[shared] = readers[v_reads] + noise(s)
            attn["o_proj"].weight[:, one] = 0.2 * content.T


def noise(shape: Shape) -> Tensor:
    """A little of everything, [head_dim, hidden]."""
    return torch.randn(shape.head_dim, shape.hidden) * 0.1 * shape.hidden**-0.5


@torch.no_grad()
def grow(old: Llama, shape: Shape, ids: Tensor) -> Llama:
    """The same model with more heads: in layers 0 and 1 they look at fixed distances.

    ids [rows, length] is a sample of the data. A direction that is near constant over it takes
    the part of the constant column that seed_circuits() uses; the new heads of the other layers
    start silent.
    """
    new = Llama(shape)
    source = dict(old.named_parameters())
    for name, p in new.named_parameters():
        if "o_proj" in name:
            p.zero_()
        p[tuple(slice(n) for n in source[name].shape)] = source[name]
    dim, first, group = shape.head_dim, old.shape.heads, shape.heads // shape.kv_heads
    for index, distances in enumerate(GROWN_DISTANCES):
        attn = new.layers[index].self_attn
        x = new.hidden_before(index, ids).flatten(0, 1)
        ridge = x.T @ x + 1e-3 * len(x) * torch.eye(shape.hidden)
        constant = torch.linalg.solve(ridge, x.sum(0))
        for head, back in enumerate(distances, start=first):
            one, kv = slice(head * dim, (head + 1) * dim), head // group
            shared = slice(kv * dim, (kv + 1) * dim)
            attn["q_proj"].weight[one] = 3.9 * torch.outer(_distance_vector(shape, back), constant)
            attn["k_proj"].weight[shared] = 3.9 * torch.outer(_distance_vector(shape, 0), constant)
            attn["v_proj"].weight[shared] = torch.linalg.qr(torch.randn(shape.hidden, dim)).Q.T
            attn["o_proj"].weight[:, one] = 0.04 * torch.linalg.qr(torch.randn(shape.hidden, dim)).Q
    return new


def _distance_vector(shape: Shape, back: int) -> Tensor:
    """The half of a query or key that makes RoPE's score peak `back` tokens away.

    Pair f turns by its frequency each token; the query is turned `back` tokens less, so that the
    angles agree there. The fastest pairs weigh most: they tell neighbours apart.
    """
    half = shape.head_dim // 2
    inv = shape.rope_theta ** -(torch.arange(half) / half)
    amplitude = 2.3 * 0.7 ** torch.arange(half)
    return torch.cat(((inv * -back).cos() * amplitude, (inv * -back).sin() * amplitude))


def rope_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, head_dim], the halves repeated as in Llama's rotate_half."""
    inv = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_positions).double(), inv).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [rows, heads, length, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


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
        rows = Rows(tokenizer, args.seed, index)
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
