"""Products and layernorms against float64."""

import pytest
import torch
import torch.nn.functional as F
from against_transformers import assert_rounded, check_linear_sum, check_linears, norms, random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.model.arithmetic import Arithmetic, LayerNorm


sizes = st.integers(1, 17)
batch_shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(deadline=None, max_examples=40)
@given(batch_shapes, sizes, st.lists(sizes, min_size=1, max_size=3), dtypes, st.booleans(), st.booleans(), norms)
def test_linears(shape, n_in, n_outs, dtype, with_biases, relu, norm):
    check_linears(Arithmetic(), shape, n_in, n_outs, dtype, with_biases, relu, norm)


@settings(deadline=None, max_examples=40)
@given(batch_shapes, st.lists(sizes, min_size=1, max_size=3), sizes, dtypes, st.booleans(), st.booleans())
def test_linear_sum(shape, n_ins, n_out, dtype, with_bias, with_residual):
    check_linear_sum(Arithmetic(), shape, n_ins, n_out, dtype, with_bias, with_residual)


def test_linear():
    x, weight = random(1, 5, 40), random(2, 6, 40, dtype=torch.float16)
    assert_rounded(Arithmetic().linears(x, [weight])[0], x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_round_both_factors(dtype):
    """As on Neuron: the factors are rounded, the results are float32."""
    x, weight = random(1, 5, 40), random(2, 6, 40, dtype=dtype)
    exact = x.to(dtype).double() @ weight.double().T
    y = Arithmetic(dtype).linears(x, [weight])[0]
    assert y.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2.0**-9, 1.0, 8.0], ids=["small", "usual", "large"])
def test_int8_weights_are_scaled_after_the_product(dtype, size):
    """Weights are not rounded to 16 bits. The sums before scaling would leave the range of float16."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (6, 4096), dtype=torch.int8, generator=generator)
    scale = torch.rand(6, 1, generator=generator) * 0.01 + 0.001
    bias, residual = random(2, 6), random(3, 2, 5, 6)
    # Activations with the signs of a row of weights: the largest sums of their size.
    x = size * (weight[0].sign() * torch.rand(2, 5, 4096, generator=generator)).to(dtype).float()
    exact = (x.double() @ weight.double().T) * scale.double().T
    assert size < 8 or (exact / scale.double().T).abs().max() > torch.finfo(torch.float16).max
    y = Arithmetic(dtype).linear_sum([x], [weight], scale=scale)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    assert (y - exact).abs().max() < eps * exact.abs().max()
    (several,) = Arithmetic(dtype).linears(x, [weight], [bias], scales=[scale])
    assert torch.equal(several, y + bias)
    summed = Arithmetic(dtype).linear_sum([x, x], [weight, weight], bias, residual, scale)
    assert (summed - (2 * exact + bias + residual)).abs().max() < 2 * eps * exact.abs().max()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 33), st.floats(-100, 100), st.floats(0.1, 1e3), st.booleans())
def test_layer_norm(rows, size, mean, scale, affine):
    x = mean + scale * random(0, 2, rows, size)
    weight, bias = (random(1, size), random(2, size)) if affine else (None, None)
    wide = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    expected = F.layer_norm(x.double(), (size,), *wide).float()
    torch.testing.assert_close(Arithmetic().layer_norm(x, LayerNorm(weight, bias)), expected, rtol=1e-3, atol=1e-3)
