"""The Triton product against float64, over every way to cut and scale it."""

import pytest
import torch

from common.engine.kernels.triton import gemm
from common.engine.kernels.triton.gemm import Workspace, choose_tiles, matmul
from common.engine.kernels.triton.quantize import quantize, quantize_blocks
from common.engine.quantization.scheme import Activation
from common.errors import ConfigError

CPU = torch.device("cpu")
E4M3_SHAPES = [(1, 64, 128), (17, 200, 400), (3, 256, 1040), (65, 64, 144), (130, 72, 272)]


def make_workspace(multiprocessors=2):
    return Workspace.on(CPU, multiprocessors)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def spread(scale, shape):
    """A scale of any form, one value for each element."""
    rows, columns = shape
    if scale.shape[1] == 1:
        return scale.double().expand(shape)
    scale = scale.double().repeat_interleave(128, 1)[:, :columns]
    return scale if len(scale) == rows else scale.repeat_interleave(128, 0)[:rows]


def exact(x, weight, scale, bias=None):
    values = x.values.double() * spread(x.scale, x.values.shape)
    product = values @ (weight.double() * spread(scale, weight.shape)).T
    return product if bias is None else product + bias.double()


def assert_close(actual, expected, k):
    """float32 sums of k terms, rounded once to float16."""
    bound = expected.abs() * 2**-10 + expected.abs().max() * k * 2**-24
    assert ((actual.double() - expected).abs() <= bound).all()


# One tile and parts of tiles, each way to cut a product, K in one part and in several.
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 64), (16, 200, 136), (17, 70, 1032), (65, 64, 72), (130, 70, 200)]
)
def test_float_products_are_float64s(m, n, k):
    x, weight, bias = random(m, k).half(), random(n, k, seed=1).half(), random(n).half()
    out = matmul(x, weight, make_workspace(), bias=bias)
    assert_close(out, x.double() @ weight.double().T + bias.double(), k)


@pytest.mark.parametrize(("m", "n", "k"), E4M3_SHAPES)
@pytest.mark.parametrize("activation", [Activation.TOKEN, Activation.TENSOR])
def test_products_with_a_scale_a_row_and_a_token_are_float64s(m, n, k, activation):
    x = quantize(random(m, k).half(), activation, torch.tensor(0.01))
    weight, scale = quantize_rows(random(n, k, seed=1))
    bias = random(n, seed=2).half()
    out = matmul(x, weight, make_workspace(), scale=scale, bias=bias)
    assert_close(out, exact(x, weight, scale, bias), k)


@pytest.mark.parametrize(("m", "n", "k"), E4M3_SHAPES)
def test_products_with_a_scale_a_block_and_a_group_are_float64s(m, n, k):
    # Rows and columns of very different size: a scale in the wrong place shows.
    size = torch.exp(random(k, seed=3)) * torch.exp(random(n, 1, seed=4))
    x = quantize(random(m, k) * torch.exp(random(m, 1, seed=5)), Activation.GROUP)
    weight, scale = quantize_blocks(random(n, k, seed=1) * size)
    out = matmul(x, weight, make_workspace(), scale=scale)
    assert_close(out, exact(x, weight, scale), k)


@pytest.mark.parametrize("forms", ["row-group", "block-token"])
def test_scales_of_rows_and_of_groups_mix(forms):
    x = quantize(random(3, 400), Activation.GROUP if forms == "row-group" else Activation.TOKEN)
    weight = random(200, 400, seed=1)
    weight, scale = quantize_rows(weight) if forms == "row-group" else quantize_blocks(weight)
    out = matmul(x, weight, make_workspace(), scale=scale)
    assert_close(out, exact(x, weight, scale), 400)


def test_programs_that_share_a_tile_leave_the_workspace_as_they_found_it():
    workspace = make_workspace(8)
    assert choose_tiles(3, 96, 2048, True, 8, False).split == 4
    x = quantize(random(3, 2048).half(), Activation.TOKEN)
    weight, scale = quantize_rows(random(96, 2048, seed=1))
    first = matmul(x, weight, workspace, scale=scale)
    assert_close(first, exact(x, weight, scale), 2048)
    assert not workspace.arrived.any()
    assert torch.equal(matmul(x, weight, workspace, scale=scale), first)


def test_the_shared_tiles_of_every_shape_fit_the_workspace():
    for m in (1, 16, 33, 64, 65, 128, 200, 1000):
        for n in (64, 1024, 4096, 6144, 28672):
            tiles = choose_tiles(m, n, 4096, True, 132, False)
            programs = -(-m // tiles.m) * -(-n // tiles.n) * tiles.split
            if tiles.split > 1:
                assert programs <= gemm.PROGRAMS_PER_SM * 132
                assert tiles.m * tiles.n <= 128 * 64


def test_batch_invariant_rows_are_bitwise_the_same_whatever_comes_with_them():
    # The rows keep their place in a tile: numpy's own product is not the same in another.
    cuts = {choose_tiles(m, 4096, 4096, True, 132, True) for m in (1, 16, 64, 100, 8192)}
    assert len(cuts) == 1
    x = random(130, 272).half()
    weight = random(96, 272, seed=1).half()
    workspace = make_workspace()
    together = matmul(x, weight, workspace, batch_invariant=True)
    for rows in (slice(0, 1), slice(0, 20), slice(64, 130)):
        alone = matmul(x[rows], weight, workspace, batch_invariant=True)
        assert torch.equal(alone, together[rows])


def test_rows_that_tma_cannot_read_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"rows of 100 .*kernels=reference"):
        matmul(random(1, 100).half(), random(8, 100).half(), make_workspace())


def test_no_rows_give_no_rows():
    x = quantize(torch.empty(0, 128), Activation.TOKEN)
    weight, scale = quantize_rows(random(64, 128))
    assert matmul(x, weight, make_workspace(), scale=scale).shape == (0, 64)
