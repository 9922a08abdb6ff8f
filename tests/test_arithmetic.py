"""Products and layernorms against float64."""

import pytest
import torch
import torch.nn.functional as F
from against_transformers import assert_rounded, random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.arithmetic import Arithmetic


sizes = st.integers(1, 17)
batch_shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(deadline=None, max_examples=40)
@given(batch_shapes, sizes, sizes, dtypes, st.booleans(), st.booleans(), st.booleans())
def test_linear(shape, n_in, n_out, dtype, with_bias, relu, with_residual):
    x, weight = random(1, *shape, n_in), random(2, n_out, n_in, dtype=dtype)
    bias = random(3, n_out, dtype=dtype) if with_bias else None
    residual = random(4, *shape, n_out) if with_residual else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = (exact.clamp(min=0) if relu else exact) + (0 if residual is None else residual.double())
    assert_rounded(Arithmetic().linear(x, weight, bias, relu, residual), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_round_both_factors(dtype):
    """As on Neuron: the factors are rounded, the results are float32."""
    x, weight = random(1, 5, 40), random(2, 6, 40, dtype=dtype)
    exact = x.to(dtype).double() @ weight.double().T
    y = Arithmetic(dtype).linear(x, weight)
    assert y.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps * float(exact.abs().max()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 33), st.floats(-100, 100), st.floats(0.1, 1e3), st.booleans())
def test_layer_norm(rows, size, mean, scale, affine):
    x = mean + scale * random(0, 2, rows, size)
    weight, bias = (random(1, size), random(2, size)) if affine else (None, None)
    wide = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    expected = F.layer_norm(x.double(), (size,), *wide).float()
    torch.testing.assert_close(Arithmetic().layer_norm(x, weight, bias), expected, rtol=1e-3, atol=1e-3)
