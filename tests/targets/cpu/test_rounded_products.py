"""`torch.set_float32_matmul_precision("medium")`: products of bfloat16 factors, against float64."""

from __future__ import annotations

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import rounded, tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, variants


# Weights of these dtypes are rounded with so many rows; int8 ones with fewer rows are multiplied with exact integers.
LEAST_ROWS = {
    "avx512_amx": {torch.bfloat16: 5, torch.float16: 8, torch.float32: 8, torch.int8: 22},
    "avx512_bf16": {torch.bfloat16: 4, torch.float16: 12, torch.float32: 12, torch.int8: 5},
}
ROUNDING = [variant for variant in LEAST_ROWS if variant in variants()]

needs_units = pytest.mark.skipif(not ROUNDING, reason="this processor has no AVX-512 BF16")
every_rounding = pytest.mark.parametrize("variant", ROUNDING)


pytestmark = pytest.mark.usefixtures("medium")


def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


def weights_of(dtype, seed, n, k, view):
    if dtype == torch.int8:
        return (100 * random(seed, n, k + view)).clamp(-128, 127).to(dtype)[:, view:]
    return random(seed, n, k + view, dtype=dtype)[:, view:]


def stored_by_unit(weight):
    """With a stride of 1 along the outputs; a matrix of one row or column has it anyhow."""
    return weight.T.contiguous().T


shapes = (
    st.sampled_from([1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 25, 49, 100, 200, 513]),
    st.sampled_from([2, 3, 4, 5, 23, 24, 25, 48, 49, 130, 200]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int8]),
    *[st.booleans()] * 2,
    st.sampled_from([0, 3, 32]),
)
depths = st.sampled_from([2, 3, 31, 32, 33, 63, 64, 65, 130, 255, 257, 1023, 1024, 1025])


class Case:
    """Factors of products, and what goes on with their sums.

    Args:
        m, n, ks: x `(m, k)` and weight `(n, k)` for each of `ks`.
    """

    def __init__(self, m, n, ks, dtype, with_bias, view):
        self.xs = [random(1 + i, m, k) / k**0.5 for i, k in enumerate(ks)]
        self.weights = [weights_of(dtype, 5 + i, n, k, view) for i, k in enumerate(ks)]
        whole = dtype == torch.int8
        self.scale = random(8, n, 1).abs() / 100 + 1e-3 if whole else None
        self.bias = random(9, n, dtype=torch.float32 if whole else dtype) if with_bias else None

    def expected(self, rounds: bool) -> torch.Tensor:
        """The sum of all products, scaled, and the bias, in float64."""
        convert = in_bfloat16 if rounds else torch.Tensor.double
        total = sum(convert(x) @ convert(weight).T for x, weight in zip(self.xs, self.weights, strict=True))
        total = total if self.scale is None else total * self.scale.double().T
        return total if self.bias is None else total + self.bias.double()


def assert_close(actual, exact):
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


@needs_units
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ROUNDING or [None]), *shapes, depths)
def test_linears(variant, m, n, dtype, with_bias, relu, view, k):
    case = Case(m, n, [k], dtype, with_bias, view)
    biases, scales = (None if given is None else [given] for given in (case.bias, case.scale))
    (y,) = KernelArithmetic(variant=variant).linears(case.xs[0], case.weights, biases, relu, scales=scales)
    expected = case.expected(rounds=m >= LEAST_ROWS[variant][dtype])
    assert_close(y, expected.relu() if relu else expected)


@needs_units
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(ROUNDING or [None]), *shapes, st.lists(depths, min_size=1, max_size=3), st.booleans())
def test_linear_sum(variant, m, n, dtype, with_bias, with_residual, view, ks, by_unit):
    """By unit, up to 8 rows read the units that are not zero, in float32."""
    case = Case(m, n, ks, dtype, with_bias, view)
    weights = [stored_by_unit(weight) for weight in case.weights] if by_unit else case.weights
    residual = random(10, m, n) if with_residual else None
    y = KernelArithmetic(variant=variant).linear_sum(case.xs, weights, case.bias, residual, case.scale)
    expected = case.expected(rounds=m > 8 if by_unit else m >= LEAST_ROWS[variant][dtype])
    assert_close(y, expected if residual is None else expected + residual.double())


@every_rounding
@pytest.mark.parametrize("by_unit", [False, True])
def test_many_rows(variant, by_unit):
    case = Case(17000, 17, [20], torch.bfloat16, with_bias=False, view=0)
    weights = [stored_by_unit(weight) for weight in case.weights] if by_unit else case.weights
    assert_close(KernelArithmetic(variant=variant).linear_sum(case.xs, weights), case.expected(rounds=True))


def test_other_variants_stay_exact():
    x, weight = random(1, 40, 100), random(2, 50, 100, dtype=torch.bfloat16)
    for variant in variants():
        if variant not in ROUNDING:
            for stored in (weight, stored_by_unit(weight)):
                y = KernelArithmetic(variant=variant).linear_sum([x], [stored])
                torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@every_rounding
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_only_medium_rounds(variant, precision):
    torch.set_float32_matmul_precision(precision)
    x, weight = random(1, 40, 100), random(2, 50, 100, dtype=torch.bfloat16)
    for stored in (weight, stored_by_unit(weight)):
        y = KernelArithmetic(variant=variant).linear_sum([x], [stored])
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@every_rounding
def test_what_is_not_finite_stays_so(variant):
    x, weight = random(1, 30, 70), random(2, 50, 70, dtype=torch.float16)
    x[3, 5], x[4, 69], weight[7, 69] = float("inf"), float("nan"), float("-inf")
    for stored in (weight, stored_by_unit(weight)):
        y = KernelArithmetic(variant=variant).linear_sum([x], [stored])
        expected = x @ weight.float().T
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@needs_units
@pytest.mark.parametrize("amp", ["bf16", "f16"])
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_logits_are_those_of_bfloat16_factors(amp, tp_degree, save_opt):
    """Within the tolerance of 16-bit activations; with the default they are float32's."""
    source = tiny_opt()
    options = {"amp": amp, "tp_degree": tp_degree, "kv_cache_dtype": "f32"}
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(source), batch_size=2, sequence_length=96, **options)
    ids = torch.randint(4, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")  # torch's own products would be rounded, too, where there is AMX
    with torch.no_grad():
        theirs = rounded(source, torch.bfloat16 if amp == "bf16" else torch.float16)(ids).logits
    torch.set_float32_matmul_precision("medium")
    difference = (model(ids).logits - theirs).abs().max() / theirs.std()
    assert 1e-3 < difference < 4e-2
    torch.set_float32_matmul_precision("highest")
    assert (model(ids).logits - theirs).abs().max() < 1e-3 * theirs.std()
