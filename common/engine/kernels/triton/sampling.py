"""From logits to tokens on the device: the tokens that common/engine/sampler.py chooses.

Nothing is sorted. Logits are mapped to whole numbers of the same order; the cut of top-k or top-p
is where a count or a sum of weights, from the likeliest token down, passes a goal: a radix search,
four bits a pass (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units").
The token drawn is where the sum of what is left, in the order of ids, passes the random number.
Sums are float64 in a fixed order. All rows and parts of rows work side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from common.engine.device import move
from common.engine.sampling_params import SamplingParams

CHUNK = 2048  # logits in one program
SLICE = 256  # of them at a time: 16 sums for each are in registers
PASSES = 8  # of 4 bits: keys have 32
UNUSABLE = -1  # instead of a token: the row's logits have NaN, +inf, or no possible token


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How to choose, a column a row, on the device.

    reals   float64 [3, n]: temperature (0: greedy), min-p, top-p
    whole   int64 [3, n]: top-k (the vocabulary's size: all), seed, position of the new token
    random, top_k, top_p   whether any row is not greedy, or has that filter
    """

    reals: torch.Tensor
    whole: torch.Tensor
    random: bool
    top_k: bool
    top_p: bool

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
        vocab: int,
        device: torch.device,
    ) -> "SamplingRows":
        """seeds in [0, 2**64). Copies to the device without waiting for it."""
        reals = torch.tensor(
            [[p.temperature for p in params], [p.min_p for p in params], [p.top_p for p in params]],
            dtype=torch.float64,
        )
        top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
        whole = torch.tensor([top_k, signed, list(positions)], dtype=torch.int64)
        return cls(
            move(reals, device),
            move(whole, device),
            random=not all(p.greedy for p in params),
            top_k=any(k < vocab for k in top_k),
            top_p=any(p.top_p < 1 for p in params),
        )


@triton.jit
def key_of(x):
    """float32 -> int64 in [0, 2**32) of the same order; NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, ordered).to(tl.int64) + 0x80000000


@triton.jit
def value_of(key):
    """The inverse of key_of."""
    ordered = (key - 0x80000000).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, peak, temperature, min_p):
    """float32 -> float64, relative to the likeliest token; 0 under min-p."""
    weight = tl.exp((x.to(tl.float64) - peak.to(tl.float64)) / temperature)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def uniform_of(seed, position):
    """Philox 4x32-10 of the seed (key) and position (counter) -> float64 in [0, 1)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (first.to(tl.uint64) << 32) | second.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def peak_kernel(logits, peaks, vocab, row_stride, CHUNK: tl.constexpr):
    """The likeliest token of each chunk; of equal ones the first, packed so that max finds it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < vocab, other=0.0)
    packed = ((key_of(x) - 0x80000000) << 32) | (0x7FFFFFFF - token)
    packed = tl.where(token < vocab, packed, -0x7FFFFFFFFFFFFFFF)
    tl.store(peaks + row * tl.num_programs(1) + chunk, tl.max(packed))


# `keys` is a row of a tensor of three: aligned to 16 bytes for even n only.
@triton.jit(do_not_specialize_on_alignment=["keys"])
def begin_kernel(peaks, tokens, keys, chunks, CHUNKS: tl.constexpr):
    """The likeliest token of each row, or UNUSABLE, and its key."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    low = -0x7FFFFFFFFFFFFFFF
    best = tl.max(tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=low))
    ordered = best >> 32
    usable = (ordered < 0x7F800000) & (ordered > -0x7F800001)  # between the infinities
    tl.store(tokens + row, tl.where(usable, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1))
    tl.store(keys + row, ordered + 0x80000000)


@triton.jit
def descend(
    parts, state, cut, row, n, chunks, goal, shift, BY_COUNT: tl.constexpr, CHUNKS: tl.constexpr
):
    """Which of the 16 slots of the last pass holds the goal. -> prefix of the key, count above it,
    mass above it, and the row's whole mass of that pass."""
    prefix = tl.load(state + row).to(tl.int64)
    count, mass = tl.load(state + n + row), tl.load(state + 2 * n + row)
    slot = tl.arange(0, 16)
    chunk = tl.arange(0, CHUNKS)[:, None]
    at = (row * chunks + chunk) * 16 + slot[None, :]
    inside = (chunk < chunks) & (slot[None, :] >= 0)
    masses = tl.sum(tl.load(parts + at, mask=inside, other=0.0), 0)
    counts = tl.sum(tl.load(parts + n * chunks * 16 + at, mask=inside, other=0.0), 0)
    measure = counts if BY_COUNT else masses
    through = (count if BY_COUNT else mass) + tl.cumsum(measure, 0)
    # Rounding must not lead past the last token that the filters so far let through.
    allowed = prefix * 16 + 15 - slot >= tl.load(cut + row) >> shift
    found = tl.min(tl.where(allowed & (through > goal), slot, 16))
    last = tl.max(tl.where(allowed & (measure > 0.0), slot, 0))
    found = tl.where(found == 16, last, found)
    count += tl.sum(tl.where(slot < found, counts, 0.0))
    mass += tl.sum(tl.where(slot < found, masses, 0.0))
    return prefix * 16 + 15 - found, count, mass, tl.sum(masses)


@triton.jit
def goal_of(reals, whole, row, n, total, SEARCH: tl.constexpr):
    """What the measure from the likeliest token down must pass: a count for top-k, else a mass."""
    if SEARCH == "top_k":
        return (tl.load(whole + row) - 1).to(tl.float64)
    else:
        return tl.load(reals + 2 * n + row) * total


@triton.jit(do_not_specialize=["n", "shift"], do_not_specialize_on_alignment=["keys"])
def narrow_kernel(
    logits, keys, reals, whole, totals, cut, before, after, old, new,
    n, vocab, chunks, row_stride, shift,
    SEARCH: tl.constexpr, PASS: tl.constexpr, FIRST: tl.constexpr,
    CHUNK: tl.constexpr, SLICE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One pass: settles four bits by the last pass's sums, and sums up the next four's slots.

    before, after  parts of the last and of this pass: float64 [2 (mass, count), n, chunks, 16]
    old, new       state then and now: float64 [4 (prefix, count, mass, goal), n]
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    prefix = tl.zeros((), tl.int64)
    if PASS > 0:
        if PASS == 1:
            # The first pass of all saw every weight: their sum is the total.
            if FIRST:
                _, _, _, total = descend(before, old, cut, row, n, chunks, 0.0, shift + 4,
                                         SEARCH == "top_k", CHUNKS)  # fmt: skip
                tl.store(totals + row, total)
            else:
                total = tl.load(totals + row)
            goal = goal_of(reals, whole, row, n, total, SEARCH)
        else:
            goal = tl.load(old + 3 * n + row)
        prefix, count, mass, _ = descend(
            before, old, cut, row, n, chunks, goal, shift + 4, SEARCH == "top_k", CHUNKS
        )
        tl.store(new + row, prefix.to(tl.float64))
        tl.store(new + n + row, count)
        tl.store(new + 2 * n + row, mass)
        tl.store(new + 3 * n + row, goal)
    temperature = tl.load(reals + row)
    temperature = tl.where(temperature > 0.0, temperature, 1.0)
    peak, min_p = value_of(tl.load(keys + row)), tl.load(reals + n + row)
    slots = tl.arange(0, 16)[None, :]
    masses = tl.zeros((SLICE, 16), tl.float64)
    counts = tl.zeros((SLICE, 16), tl.int32)
    for start in tl.range(0, CHUNK, SLICE):
        token = chunk * CHUNK + start + tl.arange(0, SLICE)
        inside = token < vocab
        x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=inside, other=0.0)
        key = key_of(x)
        inside = inside & ((key >> (shift + 4)) == prefix)
        slot = tl.where(inside, 15 - ((key >> shift) & 15), 16).to(tl.int32)
        mine = slot[:, None] == slots
        masses += tl.where(mine, weight_of(x, peak, temperature, min_p)[:, None], 0.0)
        if SEARCH == "top_k":
            counts += mine.to(tl.int32)
    at = after + (row * chunks + chunk) * 16 + tl.arange(0, 16)
    tl.store(at, tl.sum(masses, 0))
    if SEARCH == "top_k":
        tl.store(at + n * chunks * 16, tl.sum(counts, 0).to(tl.float64))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["keys"])
def settle_kernel(
    keys, reals, totals, cut, kept, parts, state, n, chunks,
    SEARCH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The last four bits of a search, and what it means: the mass that the filter lets through, and
    the cut (the last key, and how many of those equal to it, the first ones)."""
    row = tl.program_id(0)
    goal = tl.load(state + 3 * n + row)
    key, count, mass, _ = descend(
        parts, state, cut, row, n, chunks, goal, 0, SEARCH == "top_k", CHUNKS
    )
    temperature = tl.load(reals + row)
    temperature = tl.where(temperature > 0.0, temperature, 1.0)
    peak = value_of(tl.load(keys + row))
    weight = weight_of(value_of(key), peak, temperature, tl.load(reals + n + row))
    if SEARCH == "top_k":
        equal = goal + 1.0 - count
        tl.store(totals + row, mass + equal * weight)
    else:
        # Those before which the mass does not reach the goal.
        equal = tl.ceil((goal - mass) / tl.where(weight > 0.0, weight, 1.0))
        limited = tl.load(reals + 2 * n + row) < 1.0
        # A row without this filter keeps the cut it has.
        key = tl.where(limited, key, tl.load(cut + row))
        equal = tl.where(limited, equal, tl.load(kept + row).to(tl.float64))
    tl.store(cut + row, key)
    tl.store(kept + row, equal.to(tl.int64))


@triton.jit
def load_weights(logits, keys, reals, cut, row, chunk, n, vocab, row_stride, CHUNK: tl.constexpr):
    """A chunk's tokens, the weights of those over the cut (else 0), which are equal to it, and the
    weight of one of these."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=inside, other=0.0)
    temperature = tl.load(reals + row)
    temperature = tl.where(temperature > 0.0, temperature, 1.0)
    peak, min_p = value_of(tl.load(keys + row)), tl.load(reals + n + row)
    last = tl.load(cut + row)
    key = key_of(x)
    weights = tl.where(inside & (key > last), weight_of(x, peak, temperature, min_p), 0.0)
    return (
        token,
        weights,
        inside & (key == last),
        weight_of(value_of(last), peak, temperature, min_p),
    )


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["keys"])
def mass_kernel(
    logits, keys, reals, cut, masses, ties, n, vocab, chunks, row_stride, CHUNK: tl.constexpr
):  # fmt: skip
    """Of each chunk the mass of the tokens over the cut, and how many are equal to it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    _, weights, equal, _ = load_weights(
        logits, keys, reals, cut, row, chunk, n, vocab, row_stride, CHUNK
    )
    tl.store(masses + row * chunks + chunk, tl.sum(weights))
    tl.store(ties + row * chunks + chunk, tl.sum(equal.to(tl.int32)))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["keys"])
def pick_kernel(
    logits, keys, reals, whole, cut, kept, masses, ties, tokens, n, vocab, chunks, row_stride,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The token where the sum passes the random number: first its chunk, then itself. Greedy and
    unusable rows have theirs."""
    row = tl.program_id(0)
    allowed = tl.load(kept + row)
    chunk = tl.arange(0, CHUNKS)
    mass = tl.load(masses + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    equal = tl.load(ties + row * chunks + chunk, mask=chunk < chunks, other=0).to(tl.int64)
    before = tl.cumsum(equal, 0) - equal
    _, _, _, weight = load_weights(logits, keys, reals, cut, row, 0, n, vocab, row_stride, CHUNK)
    some = tl.minimum(tl.maximum(allowed - before, 0), equal).to(tl.float64)
    # Without a cut its weight means nothing.
    mass += tl.where(some > 0.0, some * weight, 0.0)
    goal = uniform_of(tl.load(whole + n + row), tl.load(whole + 2 * n + row)) * tl.sum(mass)
    found = tl.min(tl.where(tl.cumsum(mass, 0) > goal, chunk, CHUNKS))
    # Rounding may carry the goal to the very end: the last one with some weight is meant.
    found = tl.where(found == CHUNKS, tl.max(tl.where(mass > 0.0, chunk, 0)), found)
    goal -= tl.sum(tl.where(chunk < found, mass, 0.0))
    allowed -= tl.sum(tl.where(chunk < found, equal, 0))

    token, weights, same, _ = load_weights(
        logits, keys, reals, cut, row, found, n, vocab, row_stride, CHUNK
    )
    first = same & (tl.cumsum(same.to(tl.int32), 0) <= allowed)
    weights = tl.where(first, weight, weights)
    chosen = tl.min(tl.where(tl.cumsum(weights, 0) > goal, token, vocab))
    chosen = tl.where(chosen == vocab, tl.max(tl.where(weights > 0.0, token, 0)), chosen)
    random = (tl.load(reals + row) > 0.0) & (tl.load(tokens + row) >= 0)
    tl.store(tokens + row, chosen.to(tl.int64), mask=random)


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """One token a row, int64 [n], on the device; UNUSABLE for a row without usable logits.

    logits  [n, vocab] float32, rows contiguous
    """
    n, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    sizes = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(chunks)}
    whole = torch.empty(3, n, dtype=torch.int64, device=logits.device)
    tokens, keys, kept = whole.unbind(0)
    peaks = torch.empty(n, chunks, dtype=torch.int64, device=logits.device)
    peak_kernel[(n, chunks)](logits, peaks, vocab, logits.stride(0), CHUNK=CHUNK, num_warps=4)
    begin_kernel[(n,)](peaks, tokens, keys, chunks, CHUNKS=sizes["CHUNKS"], num_warps=1)
    if not rows.random:
        return tokens
    kept.zero_()
    cut = torch.zeros(n, dtype=torch.int64, device=logits.device)  # under every key
    stride = logits.stride(0)
    if rows.top_k or rows.top_p:
        find_cuts(logits, rows, keys, cut, kept, sizes)
    masses = torch.empty(n, chunks, dtype=torch.float64, device=logits.device)
    ties = torch.empty(n, chunks, dtype=torch.int32, device=logits.device)
    mass_kernel[(n, chunks)](
        logits, keys, rows.reals, cut, masses, ties, n, vocab, chunks, stride,
        CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    pick_kernel[(n,)](
        logits, keys, rows.reals, rows.whole, cut, kept, masses, ties, tokens,
        n, vocab, chunks, stride, num_warps=4, **sizes,
    )  # fmt: skip
    return tokens


def find_cuts(
    logits: torch.Tensor,
    rows: SamplingRows,
    keys: torch.Tensor,
    cut: torch.Tensor,
    kept: torch.Tensor,
    sizes: dict[str, int],
) -> None:
    """Writes what top-k and then top-p let through: keys over cut [n], and the first kept [n] of
    those equal to it."""
    n, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    totals = torch.empty(n, dtype=torch.float64, device=logits.device)
    state = torch.zeros(2, 4, n, dtype=torch.float64, device=logits.device)
    parts = torch.zeros(2, 2, n, chunks, 16, dtype=torch.float64, device=logits.device)
    searches = [s for s, used in (("top_k", rows.top_k), ("top_p", rows.top_p)) if used]
    for index, search in enumerate(searches):
        state[0].zero_()
        for step in range(PASSES):
            narrow_kernel[(n, chunks)](
                logits, keys, rows.reals, rows.whole, totals, cut,
                parts[(step + 1) % 2], parts[step % 2], state[(step + 1) % 2], state[step % 2],
                n, vocab, chunks, logits.stride(0), 28 - 4 * step,
                SEARCH=search, PASS=min(step, 2), FIRST=index == 0 and step == 1,
                SLICE=min(SLICE, CHUNK), num_warps=8, **sizes,
            )  # fmt: skip
        last = (PASSES - 1) % 2
        settle_kernel[(n,)](
            keys, rows.reals, totals, cut, kept, parts[last], state[last], n, chunks,
            SEARCH=search, CHUNKS=sizes["CHUNKS"], num_warps=1,
        )  # fmt: skip
