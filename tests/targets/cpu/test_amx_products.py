"""Products of more rows, whose factors become parts of bfloat16 with Intel AMX (csrc/amx_tiles.h), against float64.

The same holds for every variant, so that the tests run all that the processor has.
"""

from __future__ import annotations

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, variants


every_variant = pytest.mark.parametrize("variant", variants())
# Below, at and beyond a tile of 16, what is streamed (64), and a call's most rows (512).
ROWS = [8, 9, 10, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 81, 96, 500, 512, 513, 530]
# Of 16 outputs, a panel of 64, a piece of 256, and the 2048 that a group of units has at most.
OUTPUTS = [2, 15, 16, 17, 63, 64, 65, 255, 257]
# Of a tile of 32, panels of 128 and 256, groups and streams of 512.
DEPTHS = [2, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 255, 257, 511, 512, 513, 1030]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def weights_of(dtype: torch.dtype, seed: int, n: int, k: int) -> Tensor:
    if dtype == torch.int8:
        return (60 * random(seed, n, k)).clamp(-128, 127).to(dtype)
    return random(seed, n, k, dtype=dtype)


def stored(weight: Tensor, by_unit: bool) -> Tensor:
    return weight.T.contiguous().T if by_unit else weight


def sums(variant: str, xs: list[Tensor], weights: list[Tensor], by_unit: bool) -> Tensor:
    scale = torch.ones(len(weights[0]), 1) if weights[0].dtype == torch.int8 else None
    arithmetic = KernelArithmetic(variant=variant, least_integer_rows=1000)  # integers have tests of their own
    return arithmetic.linear_sum(xs, [stored(w, by_unit) for w in weights], scale=scale)


def assert_as_exact_as_float32(y: Tensor, xs: list[Tensor], weights: list[Tensor]) -> None:
    """Off by at most some roundings to float32 of what is summed up: each adds up to 2^-24 of it."""
    pairs = [(x.double(), w.double()) for x, w in zip(xs, weights, strict=True)]
    exact, reach = sum(x @ w.T for x, w in pairs), sum(x.abs() @ w.abs().T for x, w in pairs)
    assert ((y.double() - exact).abs() <= 8e-7 * reach + torch.finfo(torch.float32).tiny).all()


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(variants()),
    st.sampled_from(ROWS),
    st.sampled_from(OUTPUTS),
    st.lists(st.sampled_from(DEPTHS), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    *[st.booleans()] * 2,
)
def test_sums(variant, m, n, ks, dtype, by_unit, wide):
    """With `wide`, inputs are of very different size."""
    xs = [random(1 + i, m, k) for i, k in enumerate(ks)]
    if wide:
        xs = [x * 10.0 ** torch.randint(-20, 12, x.shape, generator=torch.Generator().manual_seed(m)) for x in xs]
    weights = [weights_of(dtype, 5 + i, n, k) for i, k in enumerate(ks)]
    assert_as_exact_as_float32(sums(variant, xs, weights, by_unit), xs, weights)


@every_variant
@pytest.mark.parametrize("m", [10, 40, 70])
@pytest.mark.parametrize("n", [2040, 2050, 4100])
def test_many_outputs_by_unit(variant, m, n):
    """As many as a piece has at most, and more."""
    x, weight = random(1, m, 530), random(2, n, 530, dtype=torch.float16)
    assert_as_exact_as_float32(sums(variant, [x], [weight], True), [x], [weight])


@every_variant
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_every_bit_of_a_float32_counts(variant, dtype):
    """Powers of 2 in each place of an input, times 1: the sum of one product is the input."""
    x = torch.zeros(24, 40)
    x[torch.arange(24), torch.arange(24)] = 1 + 2.0 ** -torch.arange(24)
    weight = torch.eye(40, dtype=dtype)
    for by_unit in (False, True):
        assert torch.equal(sums(variant, [x], [weight], by_unit), x)
        assert torch.equal(sums(variant, [-x], [weight], by_unit), -x)


@every_variant
@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("m", [10, 30, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(variant, by_unit, m, dtype):
    """Infinite and NaN where a sum in float32 is, and nowhere else."""
    xs = [random(1, m, 70), random(2, m, 530)]
    weights = [weights_of(dtype, 3, 50, 70), weights_of(dtype, 4, 50, 530)]
    xs[0][3, 5], xs[1][4, 529], xs[1][5, 0], xs[1][6, 6] = (float(v) for v in ("inf", "nan", "-inf", "3e38"))
    if dtype != torch.int8:
        weights[0][7, 69], weights[1][8, 0], weights[1][9, 9] = (float(v) for v in ("-inf", "nan", "inf"))
    y = sums(variant, xs, weights, by_unit)
    expected = sum(x @ w.float().T for x, w in zip(xs, weights, strict=True))
    assert torch.equal(y.isnan(), expected.isnan())
    rows = [i for i in range(m) if i != 6]  # whose sums overflow or not by the order of sums
    assert torch.equal(y[rows].isinf(), expected[rows].isinf())
