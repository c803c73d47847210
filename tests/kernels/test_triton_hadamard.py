"""The Hadamard transform against the product with Sylvester's matrix in float64."""

import pytest
import torch

from common.engine.kernels.triton.hadamard import hadamard
from common.errors import ConfigError


def sylvester(d: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < d:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize("d", [64, 128, 256, 512])
@pytest.mark.parametrize("n", [1, 3, 130])
def test_the_transform_equals_the_product_with_sylvesters_matrix(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d)).to(torch.float16)
    expected = x.double() @ sylvester(d) / d**0.5
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_float32_keeps_its_precision():
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ sylvester(512) / 512**0.5
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_transforming_twice_gives_the_vector_back():
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-6)


def test_an_outlier_is_spread_over_the_whole_vector():
    x = torch.zeros(1, 128)
    x[0, 17] = 128.0
    assert torch.equal(hadamard(x).abs(), torch.full((1, 128), 128 / 128**0.5))


def test_a_size_that_is_not_served_is_refused_with_the_ones_that_are():
    with pytest.raises(ConfigError, match="of 96 elements is not served; use 64"):
        hadamard(torch.zeros(1, 96))
