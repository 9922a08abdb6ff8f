"""bfloat16 weights in 12 bits (csrc/coded_format.h): nothing is lost, and few rows read them, not the weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
from against_transformers import norms, random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_opt_trn.model.arithmetic import LayerNorm
from optimum_opt_trn.targets.cpu.coded import BLOCK, CodedCopies, CodedCopy, can_encode, coded_bytes, encode
from optimum_opt_trn.targets.cpu.int8_copy import Screen, int8_copy
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, variants


every_variant = pytest.mark.parametrize("variant", variants())
some_variant = st.sampled_from(variants())
# So many rows read coded weights.
MOST_ROWS = {variant: 1 if variant == "avx2" else 4 for variant in variants()}
MOST_OTHERS = 12


def matrix(seed: int, rows: int, columns: int, others: int = 0) -> Tensor:
    """bfloat16, about as a model's; each row has up to `others` weights that are very small, or 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator) / columns**0.5
    weights = torch.where(weights.abs() < 0.01 / columns**0.5, 0.02 / columns**0.5, weights)
    for row in weights:
        places = torch.randperm(columns, generator=generator)[:others]
        row[places] *= 10.0 ** -torch.randint(5, 45, (len(places),), generator=generator)
    return weights.bfloat16()


def places() -> np.ndarray:
    """Which weight each of the 64 bytes of a half is of: two to a word, and a vector takes the words' lower ones."""
    byte = np.arange(64)
    return (byte % 16 // 8 * 2 + byte % 2) * 16 + byte // 16 * 4 + byte % 8 // 2


def decoded(rows: Tensor, columns: int) -> Tensor:
    """The matrix that was coded, by the description of the format."""
    found = np.zeros((len(rows), columns), np.uint16)
    for row, coded in zip(found, rows.numpy().view(np.uint8), strict=True):
        table, others, blocks = coded[:15], coded[16:64].view("<u4"), coded[64:].reshape(-1, 3, 64)
        special = {int(word) >> 8: int(word) & 255 for word in others}
        for i, (first, second, both) in enumerate(blocks):
            for half, (low, codes) in enumerate(((first, both & 15), (second, both >> 4))):
                where = i * 128 + half * 64 + places()
                high = [table[c] if c < 15 else special[int(p)] for c, p in zip(codes, where, strict=True)]
                row[where] = np.array(high, np.uint16) << 8 | low
    return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 40), st.sampled_from([128, 256, 768]), st.integers(0, 2**32 - 1))
def test_every_row_is_there_or_refused(data, rows, columns, seed):
    """Any bits, NaN and infinities too: with few high bytes, and up to all 256 of them."""
    rng = np.random.default_rng(seed)
    kinds = data.draw(st.integers(1, 40))
    shares = 0.5 ** np.arange(kinds)
    high = rng.choice(rng.permutation(256)[:kinds], (rows, columns), p=shares / shares.sum())
    bits = torch.from_numpy((high << 8 | rng.integers(0, 256, (rows, columns))).astype(np.uint16).view(np.int16))
    given_matrix = bits.view(torch.bfloat16)
    outside = [sum(sorted(np.bincount(row, minlength=256))[:-15]) for row in high]
    assert can_encode(given_matrix) == (max(outside) <= MOST_OTHERS)
    if max(outside) > MOST_OTHERS:
        with pytest.raises(RuntimeError, match=f"{sum(o > MOST_OTHERS for o in outside)} rows cannot be coded"):
            encode(given_matrix)
        return
    coded = encode(given_matrix)
    assert coded.shape == (rows, coded_bytes(columns)) and coded.shape[1] == 64 + columns * 3 // 2
    assert torch.equal(decoded(coded, columns).view(torch.int16), bits)


def test_a_view_is_coded_as_a_whole_matrix():
    whole = matrix(0, 50, 384, others=3)
    part = whole[10:40, 128:]
    assert torch.equal(encode(part), encode(part.contiguous()))
    assert not can_encode(whole[:, :200]) and BLOCK == 128
    with pytest.raises(RuntimeError, match="not bfloat16 with contiguous rows"):
        can_encode(matrix(0, 128, 256).T)
    with pytest.raises(RuntimeError, match="not bfloat16 with contiguous rows"):
        encode(whole.half())


def arithmetic_with(variant: str, weights: list[Tensor], by_unit: bool = False) -> KernelArithmetic:
    arithmetic = KernelArithmetic(variant=variant)
    for weight in weights:
        arithmetic.coded.add(weight, CodedCopy(encode(weight.T.contiguous() if by_unit else weight), by_unit))
    return arithmetic


def assert_same(variant: str, found: list[Tensor], expected: list[Tensor], m: int) -> None:
    """To the bit with vectors of AVX-512; narrower ones add in another order."""
    for a, b in zip(found, expected, strict=True):
        if variant.startswith("avx512") or m > MOST_ROWS[variant]:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    some_variant,
    st.integers(1, 6),
    st.sampled_from([128, 256, 384, 768, 2048]),
    st.lists(st.sampled_from([1, 2, 23, 24, 25, 60, 97]), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    norms,
    st.integers(0, MOST_OTHERS),
    st.integers(0, 9),
)
def test_linears(variant, m, k, ns, biased, relu, norm, others, seed):
    weights = [matrix(seed + i, n, k, others) for i, n in enumerate(ns)]
    biases = [random(seed, n).bfloat16() for n in ns] if biased else None
    norm = norm and LayerNorm(*((random(8, k), random(9, k)) if norm == "affine" else (None, None)))
    x = random(seed, m, k)
    expected = KernelArithmetic(variant=variant).linears(x, weights, biases, relu, norm)
    assert_same(variant, arithmetic_with(variant, weights).linears(x, weights, biases, relu, norm), expected, m)


@every_variant
@pytest.mark.parametrize("by_unit", [False, True])
def test_few_rows_read_the_copies_alone(variant, by_unit):
    """NaN in the weights would show it."""
    weights = [matrix(i, 256, 128) for i in range(2)]
    arithmetic = arithmetic_with(variant, weights, by_unit)
    for weight in weights:
        weight.fill_(float("nan"))
    for m in (1, MOST_ROWS[variant], MOST_ROWS[variant] + 1, 40):
        xs = [random(i, m, 128) for i in range(2)]
        # Without zeros: of the rows that are by unit with fewer, most units would be read.
        read = arithmetic.linear_sum(xs, weights).isnan().any()
        assert read == (m > (4 if variant != "avx2" else 2) if by_unit else m > MOST_ROWS[variant])
    if not by_unit:
        assert not arithmetic.linears(random(0, 1, 128), weights)[1].isnan().any()


@every_variant
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.usefixtures("medium")
def test_eight_rows_read_half_of_the_units_coded(variant, precision):
    """NaN in the weights would show it; with more units those are read, unless coded units are multiplied in pairs."""
    torch.set_float32_matmul_precision(precision)
    weight, x = matrix(0, 200, 256).T.contiguous(), random(1, 8, 200)
    arithmetic = arithmetic_with(variant, [weight], by_unit=True)
    exact = weight.double()
    weight.fill_(float("nan"))
    in_pairs = precision == "medium" and variant == "avx512_bf16"
    assert arithmetic.linear_sum([x], [weight]).isnan().any() != in_pairs
    x[:, ::2] = 0.0
    found = arithmetic.linear_sum([x], [weight])
    torch.testing.assert_close(found.double(), x.double() @ exact.T, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=150)
@given(
    some_variant,
    st.integers(1, 33),
    st.lists(st.sampled_from([128, 200, 513, 1100]), min_size=1, max_size=2),
    st.sampled_from([128, 384, 768, 1280]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, MOST_OTHERS),
)
def test_sums_by_unit(variant, m, ks, n, zeros, biased, residual, others):
    """As close as the plain ones to float64; the same to the bit with and without skipping, and by plain units."""
    units = [matrix(k, k, n, others) for k in ks]
    weights = [unit.T.contiguous() for unit in units]
    xs = [random(i, m, k) for i, k in enumerate(ks)]
    for x in xs:
        x[:, random(7, x.shape[1]).argsort()[: int(zeros * x.shape[1])]] = 0.0
    bias = random(3, n).bfloat16() if biased else None
    rest = random(4, m, n) if residual else None
    arithmetic = KernelArithmetic(variant=variant)
    for weight, unit in zip(weights, units, strict=True):
        arithmetic.coded.add(weight, CodedCopy(encode(unit), True))
    found = arithmetic.linear_sum(xs, weights, bias, rest)
    expected = sum(x.double() @ unit.double() for x, unit in zip(xs, units, strict=True))
    expected = expected + (bias.double() if biased else 0) + (rest.double() if residual else 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    object.__setattr__(arithmetic, "skip_zeros", False)
    assert torch.equal(arithmetic.linear_sum(xs, weights, bias, rest), found)
    if m <= 2:
        plain = KernelArithmetic(variant=variant).linear_sum(xs, [unit.T for unit in units], bias, rest)
        assert torch.equal(plain, found)


@settings(deadline=None, max_examples=80)
@given(
    some_variant,
    st.integers(1, 5),
    st.sampled_from([128, 1024, 2048]),
    st.sampled_from([1, 24, 100]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([-3.0, -1.0, 2.0]),
    st.integers(0, 5),
)
def test_screened(variant, m, k, n, shards, shift, seed):
    weights = [matrix(seed + i, n, k, others=2) for i in range(shards)]
    biases = [(random(i, n) / 10 + shift).bfloat16() for i in range(shards)]
    x, screen = random(seed, m, k), Screen([int8_copy(weight) for weight in weights])
    arithmetic = arithmetic_with(variant, weights)
    expected = arithmetic.linears(x, weights, biases, relu=True)
    for _ in range(3):  # with the int8 copies, and perhaps without
        found = arithmetic.screened(x, weights, biases, screen, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif("avx512_bf16" not in variants(), reason="this processor has no AVX-512 BF16")
@pytest.mark.usefixtures("medium")
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 9),
    st.lists(st.sampled_from([128, 384, 768, 2048]), min_size=1, max_size=3),
    st.sampled_from([1, 2, 5, 23, 24, 25, 50]),
    st.booleans(),
    st.integers(0, MOST_OTHERS),
    st.integers(0, 9),
)
def test_medium(m, ks, n, biased, others, seed):
    """From 5 rows on factors are rounded, and up to 8 the copies are read: NaN in the weights would show it."""
    weights, xs = [matrix(seed + k, n, k, others) for k in ks], [random(seed + i, m, k) for i, k in enumerate(ks)]
    bias = random(seed, n).bfloat16() if biased else None
    factors = [x.bfloat16() if m > 4 else x for x in xs]
    expected = sum(x.double() @ weight.double().T for x, weight in zip(factors, weights, strict=True))
    arithmetic = arithmetic_with("avx512_bf16", weights)
    if m <= 8:
        for weight in weights:
            weight.fill_(float("nan"))
    found = arithmetic.linear_sum(xs, weights, bias)
    torch.testing.assert_close(found.double(), expected + (bias.double() if biased else 0), rtol=1e-4, atol=1e-4)
    if len(ks) == 1:
        assert torch.equal(arithmetic.linears(xs[0], weights, [bias] if biased else None)[0], found)


@pytest.mark.skipif("avx512_bf16" not in variants(), reason="this processor has no AVX-512 BF16")
@pytest.mark.usefixtures("medium")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.integers(5, 14), st.sampled_from([23, 24, 47, 48, 130, 513])),
    st.lists(st.sampled_from([2, 126, 128, 130, 384, 1100]), min_size=1, max_size=3),
    st.sampled_from([128, 384, 768, 2048]),
    st.booleans(),
    st.booleans(),
    st.integers(0, MOST_OTHERS),
    st.integers(0, 9),
)
def test_medium_by_unit(m, ks, n, biased, residual, others, seed):
    """More than 4 rows in which few units are 0, of any number: NaN in the weights would show that they are read."""
    units, xs = [matrix(seed + k, k, n, others) for k in ks], [random(seed + i, m, k) for i, k in enumerate(ks)]
    bias = random(seed, n).bfloat16() if biased else None
    rest = random(seed + 1, m, n) if residual else None
    expected = sum(x.bfloat16().double() @ unit.double() for x, unit in zip(xs, units, strict=True))
    expected = expected + (bias.double() if biased else 0) + (rest.double() if residual else 0)
    arithmetic, weights = KernelArithmetic(variant="avx512_bf16"), []
    for unit in units:
        weights.append(torch.full((n, len(unit)), float("nan"), dtype=torch.bfloat16))
        arithmetic.coded.add(weights[-1], CodedCopy(encode(unit), True))
    found = arithmetic.linear_sum(xs, weights, bias, rest)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    object.__setattr__(arithmetic, "skip_zeros", False)
    assert torch.equal(arithmetic.linear_sum(xs, weights, bias, rest), found)


@pytest.mark.skipif("avx512_bf16" not in variants(), reason="this processor has no AVX-512 BF16")
@pytest.mark.usefixtures("medium")
def test_medium_by_unit_of_an_odd_number():
    """They make no pairs: the weights are read."""
    weight, x = matrix(0, 201, 256).T.contiguous(), random(1, 8, 201)
    arithmetic = arithmetic_with("avx512_bf16", [weight], by_unit=True)
    exact = x.bfloat16().double() @ weight.double().T
    torch.testing.assert_close(arithmetic.linear_sum([x], [weight]).double(), exact, rtol=1e-4, atol=1e-4)
    weight.fill_(float("nan"))
    assert arithmetic.linear_sum([x], [weight]).isnan().all()


def test_where_not_all_weights_have_copies_none_is_read():
    weights = [matrix(i, 30, 256) for i in range(2)]
    arithmetic = arithmetic_with(variants()[0], weights[:1])
    weights[0].fill_(float("nan"))
    assert arithmetic.linears(random(0, 1, 256), weights)[0].isnan().all()


def test_a_copied_models_matrices_find_their_copies():
    weight = matrix(0, 30, 256)
    copies = CodedCopies()
    copies.add(weight, CodedCopy(encode(weight), False))
    assert copies.find([weight])[0].rows.shape == (30, 448) and not copies.find([weight[:20]])
    for moved, found in (copy.deepcopy((weight, copies)), pickle.loads(pickle.dumps((weight, copies)))):
        assert not found.find([weight]) and not copies.find([moved])
        assert torch.equal(found.find([moved])[0].rows, encode(weight))


def test_refused():
    weight, copies = matrix(0, 30, 256), CodedCopies()
    rows = encode(weight)
    for given_matrix, given_rows, by_unit in (
        (weight.half(), rows, False),
        (weight[:29], rows, False),
        (weight, rows[:, :-1], False),
        (weight, rows, True),
        (matrix(0, 30, 200), rows, False),
    ):
        with pytest.raises(RuntimeError, match="is no coded copy of"):
            copies.add(given_matrix, CodedCopy(given_rows, by_unit))
    with pytest.raises(RuntimeError, match="not contiguous int8"):
        copies.add(weight, CodedCopy(rows.view(torch.uint8), False))
