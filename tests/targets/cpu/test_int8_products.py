"""Products of int8 weights whose activations become integers (int8_products.h, amx_integers.h), against float64."""

from __future__ import annotations

import pytest
import torch
from against_transformers import assert_rounded, norms, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_opt_trn.model.arithmetic import LAYER_NORM_EPS
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, LayerNorm, variants


# Whether few rows are multiplied with integers depends on the processor: here both ways are taken on each.
arithmetics = st.builds(
    KernelArithmetic, variant=st.sampled_from(variants()), least_integer_rows=st.sampled_from([1, 16])
)
every_variant = pytest.mark.parametrize("variant", variants())
# Below, at and beyond 64 inputs, 4, 8 and 16 weight rows, a piece of 24 and of 64, two rows at a time, and tiles of 16
# digits, of which there are four at most, for 21 rows.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 16, 20, 21, 22, 191, 192, 193]
DEPTHS = [1, 15, 63, 64, 65, 127, 128, 200, 1000, 2048]
OUTPUTS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 63, 64, 65, 100]


def int8(seed: int, n: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def assert_as_exact_as_float32(
    y: Tensor, xs: list[Tensor], weights: list[Tensor], scale: Tensor, more: object
) -> None:
    """y is scale * the sum of products + more: each input is off by at most a float32's rounding of the row's largest.

    That is 2^-24, and as much again for what is rounded on the way.
    """
    xs, weights, scale = [x.double() for x in xs], [w.double() for w in weights], scale.double().T
    exact = sum(x @ w.T for x, w in zip(xs, weights, strict=True)) * scale + more
    largest = torch.cat(xs, -1).abs().amax(-1, keepdim=True)
    reach = largest * sum(w.abs().sum(-1) for w in weights) * scale
    # Products of float32 end in numbers of their own range.
    error = (y.double() - exact).abs() - 1e-6 * exact.abs() - torch.finfo(torch.float32).tiny
    assert (error <= 2**-23 * reach).all(), (error / reach).max()


@settings(deadline=None, max_examples=150)
@given(
    arithmetics,
    st.sampled_from(ROWS) | st.integers(1, 24),
    st.lists(st.sampled_from(DEPTHS) | st.integers(1, 300), min_size=1, max_size=3),
    st.sampled_from(OUTPUTS) | st.integers(1, 60),
    st.sampled_from([0, 3, 64]),
    st.sampled_from([0.0, 1.0, 1e4, 1e7]),
    *[st.booleans()] * 2,
)
def test_sums(arithmetic, m, ks, n, view, outlier, with_bias, with_residual):
    """Rows of very different size, some of them 0, and with numbers that are far above the others."""
    sizes = 10.0 ** torch.randint(-25, 20, (m, 1), generator=torch.Generator().manual_seed(m))
    sizes[1::5] = 0
    xs = [random(1 + i, m, k) * sizes for i, k in enumerate(ks)]
    xs[-1][:, -1] += outlier * sizes[:, 0]
    weights = [int8(5 + i, n, k + view)[:, view:] for i, k in enumerate(ks)]
    scale, bias = random(8, n, 1).abs() + 0.01, random(9, n) if with_bias else None
    residual = random(10, m, n) * sizes if with_residual else None
    y = arithmetic.linear_sum(xs, weights, bias, residual, scale)
    more = 0 if bias is None else bias.double()
    more = more + (0 if residual is None else residual.double())
    if with_bias or with_residual:  # which are added in float32
        rounding = 1e-6 * torch.as_tensor(more).abs()
        products = arithmetic.linear_sum(xs, weights, scale=scale).double()
        assert ((y.double() - products - more).abs() <= rounding + 1e-6 * products.abs() + 1e-37).all()
        y, more = products.float(), 0
    assert_as_exact_as_float32(y, xs, weights, scale, more)


@settings(deadline=None, max_examples=60)
@given(arithmetics, st.sampled_from([1, 2, 3, 8, 20]), st.sampled_from(DEPTHS[1:]), norms, st.booleans())
def test_several_outputs_behind_a_layernorm(arithmetic, m, k, norm, relu):
    x, weights = random(1, m, k), [int8(2 + i, n, k) for i, n in enumerate([24, 5, 31])]
    scales, biases = [random(6, len(w), 1).abs() / k for w in weights], [random(7, len(w)) for w in weights]
    parameters = (random(8, k), random(9, k)) if norm == "affine" else (None, None)
    ys = arithmetic.linears(x, weights, biases, relu, norm and LayerNorm(*parameters), scales)
    exact = x.double()
    if norm:
        affine = (p if p is None else p.double() for p in parameters)
        exact = torch.nn.functional.layer_norm(exact, (k,), *affine, eps=LAYER_NORM_EPS)
    for y, w, scale, bias in zip(ys, weights, scales, biases, strict=True):
        expected = (exact @ w.double().T) * scale.double().T + bias.double()
        assert_rounded(y, expected.relu() if relu else expected, 1e-4)


@every_variant
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_rows_that_are_not_finite(variant, m):
    """They are multiplied in float32. Other rows of the call have the same results as without them."""
    arithmetic, weight, scale = (
        KernelArithmetic(variant=variant, least_integer_rows=1),
        int8(1, 30, 130),
        random(2, 30, 1).abs(),
    )
    weight[::3, 7] = 0  # times infinity is NaN
    clean = random(3, m, 130)
    for value in (float("inf"), -float("inf"), float("nan")):
        for row in range(m):
            x = clean.clone()
            x[row, 7] = value
            y = arithmetic.linear_sum([x], [weight], scale=scale)
            expected = (x @ weight.float().T) * scale.T
            assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y == value, expected == value)
            others = [i for i in range(m) if i != row]
            assert torch.equal(y[others], arithmetic.linear_sum([clean], [weight], scale=scale)[others])


@every_variant
def test_rows_of_zeros_and_of_almost_nothing(variant):
    """Numbers whose scale a float32 cannot hold, subnormal ones, and zeros beside what is usual."""
    x, weight = random(1, 6, 200), int8(2, 30, 200)
    x[0], x[3] = 0, -0.0
    x[1] *= 1e-31
    x[2] *= 1e-42
    y = KernelArithmetic(variant=variant, least_integer_rows=1).linear_sum([x], [weight], scale=torch.ones(30, 1))
    exact = x.double() @ weight.double().T
    assert not y[[0, 3]].any()
    torch.testing.assert_close(y[2].double(), exact[2], rtol=0, atol=200 * 2.0**-149)
    for row in (1, 4, 5):
        largest = exact[row].abs().max()
        torch.testing.assert_close(y[row].double() / largest, exact[row] / largest, rtol=0, atol=1e-6)


@every_variant
@pytest.mark.parametrize("k", [65_535, 65_536, 65_537, 70_000])
@pytest.mark.parametrize("weight", [-128, 127])
def test_many_inputs_do_not_overflow(variant, k, weight):
    """The largest sums of digits that there can be, in each digit."""
    for digits in (-128, -128 * 256, -128 - 128 * 256, 127 * 65_536, -127 * 65_536):
        x = torch.full((3, k), float(digits))
        x[:, 0] = 8.355e6  # so that other numbers are their own integers
        weights = torch.full((5, k), weight, dtype=torch.int8)
        y = KernelArithmetic(variant=variant, least_integer_rows=1).linear_sum([x], [weights], scale=torch.ones(5, 1))
        torch.testing.assert_close(
            y.double(), x.double() @ weights.double().T, rtol=1e-4, atol=0
        )  # float32 sums of so many are off by that


@pytest.mark.parametrize(
    "variant", [variant for variant in variants() if variant in ("avx512_vnni", "avx512_bf16", "avx512_amx")]
)
def test_integers_do_not_depend_on_other_rows(variant):
    """Sums are exact: a row has the same bits in a call of its own, and at any place among others."""
    arithmetic, x, weight = (
        KernelArithmetic(variant=variant, least_integer_rows=1),
        random(1, 9, 300),
        int8(2, 50, 300),
    )
    scale = random(3, 50, 1).abs()
    together = arithmetic.linear_sum([x], [weight], scale=scale)
    for row in range(9):
        assert torch.equal(together[row], arithmetic.linear_sum([x[row]], [weight], scale=scale))
    parts = arithmetic.linear_sum(
        [part.contiguous() for part in x.split([100, 64, 136], 1)], list(weight.split([100, 64, 136], 1)), scale=scale
    )
    assert torch.equal(together, parts)
