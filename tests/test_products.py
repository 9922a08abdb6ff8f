"""Products against float64, eager and as a compiled step writes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.products import Products


WEIGHT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

sizes = st.integers(1, 17)
batch_shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)
dtypes = st.sampled_from(WEIGHT_DTYPES)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equals(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """`actual` is float32, and `exact`, float64, up to float32 rounding."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(batch_shapes, sizes, sizes, dtypes, st.booleans(), st.sampled_from([0, 1, 8, 100]))
def test_linear(shape, n_in, n_out, dtype, with_bias, fused_rows):
    x, weight = random(1, *shape, n_in), random(2, n_out, n_in, dtype=dtype)
    bias = random(3, n_out, dtype=dtype) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_equals(Products(fused_rows=fused_rows).linear(x, weight, bias), exact)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, sizes, sizes, sizes, dtypes, st.sampled_from([0, 8]))
def test_scores_and_mix(b, h, n, c, d, dtype, fused_rows):
    products = Products(fused_rows=fused_rows)
    query, keys = random(1, b, h, n, d), random(2, b, h, c, d, dtype=dtype)
    assert_equals(products.scores(query, keys), torch.einsum("bhnd,bhcd->bhnc", query.double(), keys.double()))
    weights, values = random(3, b, h, n, c), random(4, b, h, c, d, dtype=dtype)
    assert_equals(products.mix(weights, values), torch.einsum("bhnc,bhcd->bhnd", weights.double(), values.double()))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
def test_fused_and_plain_agree(rows, dtype):
    plain, fused = Products(), Products(fused_rows=8)
    x, weight, bias = random(1, rows, 33), random(2, 21, 33, dtype=dtype), random(3, 21, dtype=dtype)
    torch.testing.assert_close(fused.linear(x, weight, bias), plain.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    query, keys = random(4, rows, 3, 1, 8), random(5, rows, 3, 11, 8, dtype=dtype)
    torch.testing.assert_close(fused.scores(query, keys), plain.scores(query, keys), rtol=1e-5, atol=1e-5)
    weights = random(6, rows, 3, 1, 11)
    torch.testing.assert_close(fused.mix(weights, keys), plain.mix(weights, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_round_both_factors(dtype):
    """As on Neuron: the factors are rounded, the results are float32."""
    products = Products(compute_dtype=dtype)
    x, weight = random(1, 5, 40), random(2, 6, 40, dtype=dtype)
    exact = x.to(dtype).double() @ weight.double().T
    y = products.linear(x, weight)
    assert y.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps * float(exact.abs().max()))


def test_strided_weights():
    """A row-parallel shard is a view of columns, a cache view is not contiguous either."""
    whole = random(1, 6, 20, dtype=torch.float16)
    x = random(2, 2, 10)
    for fused_rows in (0, 8):
        products = Products(fused_rows=fused_rows)
        assert_equals(products.linear(x, whole[:, 10:]), x.double() @ whole[:, 10:].double().T)
        cache = random(3, 2, 3, 16, 4)[:, :, :9]
        query = random(4, 2, 3, 1, 4)
        assert_equals(products.scores(query, cache), query.double() @ cache.double().transpose(-1, -2))
