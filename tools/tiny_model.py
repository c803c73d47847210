"""baton-tiny as a torch module, and the weights that its training starts from."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
