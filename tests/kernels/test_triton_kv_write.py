"""RoPE, quantization and the write to pages, against the reference backend's separate steps."""

import pytest
import torch
import torch.nn.functional as F

from common.engine.kernels.reference import apply_rope, quantize_fp8
from common.engine.kernels.triton.kv_write import write_kv
from common.errors import ConfigError
from tests.kernels.paging import make_pages

FP8 = torch.float8_e4m3fn


def rope_of(d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(40.0)[:, None] * torch.logspace(0, -3, d // 2)
    sin = angle.sin()
    return torch.cat((angle.cos(), angle.cos()), 1), torch.cat((-sin, sin), 1)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def check(qkv, pages, positions, slots, static=None) -> None:
    """Q against the reference's; of the pages every byte: what is not written stays.

    A fused multiply-add rounds otherwise than two operations, so that K has no bytes of its own to
    be compared with. Its heads are made equal to Q's first ones: what they turned into is seen.
    """
    rope, (kv_heads, block_size) = rope_of(qkv.shape[2]), pages.payload.shape[2:4]
    heads = qkv.shape[1] - 2 * kv_heads
    qkv[:, heads:-kv_heads] = qkv[:, :kv_heads]
    v = qkv[:, -kv_heads:].clone()
    expected = apply_rope(qkv[:, :heads], *(table[positions].unsqueeze(1) for table in rope))
    payload = pages.payload.clone()
    scales = None if pages.scales is None else pages.scales.clone()

    q = write_kv(qkv, rope, positions, slots, pages.payload, pages.scales, static=static)

    torch.testing.assert_close(q, expected)
    kv = torch.stack((q[:, :kv_heads], v), 1)
    values = kv.to(payload.dtype)
    if scales is not None:
        values, scale = quantize_fp8(kv, static)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        payload[slot // block_size, :, :, slot % block_size] = values[token]
        if scales is not None:
            scales[slot // block_size, :, :, slot % block_size] = scale[token]
    assert torch.equal(bytes_of(pages.payload), bytes_of(payload))
    if scales is not None:
        assert torch.equal(pages.scales, scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "d", "block_size", "kv"),
    [
        (1, 1, 1, 64, 16, FP8),
        (1, 8, 1, 128, 1, FP8),
        (5, 6, 2, 96, 16, FP8),
        (7, 3, 3, 256, 32, FP8),
        (33, 4, 2, 64, 16, FP8),
        (5, 6, 2, 96, 16, torch.float32),
        (9, 7, 1, 128, 32, torch.float16),
    ],
)
def test_q_and_pages_have_the_bytes_of_the_reference(
    tokens, heads, kv_heads, d, block_size, kv, dtype
):
    generator = torch.Generator().manual_seed(tokens * d)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, d, generator=generator).to(dtype)
    pages = make_pages(6 + tokens // block_size, kv_heads, block_size, d, kv)
    order = torch.randperm(len(pages.payload) * block_size, generator=generator)
    positions = torch.randint(40, (tokens,), generator=generator)
    check(qkv, pages, positions, order[:tokens])


@pytest.mark.parametrize("kv", [FP8, torch.float32])
def test_qk_norm_is_fused_before_the_turn(kv):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(6, 8, 64, generator=generator)
    weight = torch.rand(6, 64, generator=generator) + 0.5
    pages = make_pages(3, 2, 16, 64, kv)
    twin = make_pages(3, 2, 16, 64, kv)
    positions, slots = torch.arange(6) + 3, torch.arange(16, 22)
    normed = qkv.clone()
    normed[:, :6] = F.rms_norm(qkv[:, :6].double(), (64,), None, 1e-6).float() * weight
    expected = write_kv(normed, rope_of(64), positions, slots, twin.payload, twin.scales)
    q = write_kv(
        qkv, rope_of(64), positions, slots, pages.payload, pages.scales, qk_norm=(weight, 1e-6)
    )
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    # A rounding of float32 may carry an element over to the next of e4m3's steps.
    far = (pages.payload.float() - twin.payload.float()).abs() > twin.payload.float().abs() / 7
    assert not far.any()
    assert torch.equal(pages.payload[:, 1].float(), twin.payload[:, 1].float())


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_rotated_q_and_k_are_their_products_with_sylvesters_matrix(d):
    generator = torch.Generator().manual_seed(d)
    qkv = torch.randn(3, 6, d, generator=generator).to(torch.float16)
    plain, rotated = (make_pages(2, 2, 16, d, torch.float16) for _ in range(2))
    positions, slots = torch.tensor([4, 0, 9]), torch.tensor([17, 31, 16])
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < d:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    before = write_kv(qkv.clone(), rope_of(d), positions, slots, plain.payload, None)
    q = write_kv(qkv, rope_of(d), positions, slots, rotated.payload, None, rotate=True)
    for value, original in ((q, before), (rotated.payload[:, 0], plain.payload[:, 0])):
        expected = original.double() @ matrix / d**0.5
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(rotated.payload[:, 1], plain.payload[:, 1])
    scores = torch.einsum("qhd,bhtd->qbht", q.double()[:, :2], rotated.payload[:, 0].double())
    unturned = torch.einsum("qhd,bhtd->qbht", before.double()[:, :2], plain.payload[:, 0].double())
    torch.testing.assert_close(scores, unturned, rtol=1e-2, atol=2e-2)


def test_nan_stays_nan_and_infinity_saturates_in_the_token_that_has_them():
    qkv = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(2))
    qkv[0, 1, 5] = torch.nan
    qkv[1, 2, 40] = torch.inf
    qkv[2, 2, 3] = torch.nan
    pages = make_pages(2, 1, 16, 64, FP8)
    positions, slots = torch.zeros(4, dtype=torch.int64), torch.arange(16, 20)
    write_kv(qkv.clone(), rope_of(64), positions, slots, pages.payload, pages.scales)
    k, v = pages.payload[1, :, 0, :4].float().unbind(0)
    assert k[0].isnan().all()
    assert v[2].isnan().all()
    assert pages.scales[1, 0, 0, 0].isnan()
    assert not k[1:].isnan().any()
    assert v[1, 40] == 448
    values, scale = quantize_fp8(qkv[1, 2])
    assert torch.equal(v[1], values.float())
    assert pages.scales[1, 1, 0, 1] == scale


def test_static_scales_are_written_beside_values_that_saturate_over_them():
    qkv = torch.randn(20, 6, 64, generator=torch.Generator().manual_seed(4))
    pages = make_pages(3, 2, 16, 64, FP8)
    static = torch.tensor([[2**-9, 0.01], [0.003, 0.0]])
    check(qkv, pages, torch.arange(20), torch.arange(16, 36), static)
    assert (pages.payload.float().abs() == 448).any()


def test_a_token_of_a_negative_slot_writes_no_kv_but_its_q_is_turned():
    qkv = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(3))
    pages = make_pages(3, 1, 16, 64, FP8)
    check(qkv, pages, torch.tensor([1, 2, 3]), torch.tensor([20, -1, -1]))


def test_rotating_heads_that_are_no_power_of_two_is_refused_with_the_remedy():
    pages = make_pages(2, 1, 16, 96, FP8)
    with pytest.raises(ConfigError, match="heads of 96 elements cannot be rotated"):
        write_kv(
            torch.randn(1, 3, 96), rope_of(96), torch.zeros(1, dtype=torch.int64),
            torch.tensor([16]), pages.payload, pages.scales, rotate=True,
        )  # fmt: skip
