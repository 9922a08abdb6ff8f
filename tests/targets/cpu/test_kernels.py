"""The kernels against float64: every variant that this processor can run, any shape, every dtype, as views."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from against_transformers import assert_rounded, check_linear_sum, check_linears, norms, random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.model.attention import MASKED
from optimum_opt_trn.targets.base import TargetError
from optimum_opt_trn.targets.cpu import kernels
from optimum_opt_trn.targets.cpu.kernels import VARIANT_VARIABLE, KernelArithmetic, chosen_variant, variants


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Below, at and beyond what a piece, a tile and a panel take at once; panels start at 21 or 49, by unit at 9, and with
# packed inputs at 65. A call has 512 rows at most.
ROWS = [1, 2, 3, 4, 7, 8, 9, 17, 20, 21, 48, 49, 56, 61, 64, 65, 192, 193, 201, 512, 513]
OUTPUTS = [1, 3, 4, 15, 16, 17, 47, 48, 49, 100, 257]
DEPTHS = [1, 5, 15, 16, 17, 64, 100, 127, 128, 129, 256, 257, 512, 513, 1023, 1025, 2100]


pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(params=[1, 2, 3], ids=["1 thread", "2 threads", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


rows = st.sampled_from(ROWS) | st.integers(1, 70)
outputs = st.sampled_from(OUTPUTS) | st.integers(1, 300)
depths = st.sampled_from(DEPTHS) | st.integers(1, 300)
views = st.sampled_from([0, 3, 32])
arithmetics = st.sampled_from(variants()).map(lambda variant: KernelArithmetic(variant=variant))


@settings(deadline=None, max_examples=60)
@given(
    arithmetics,
    rows,
    depths,
    st.lists(outputs, min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    *[st.booleans()] * 2,
    norms,
    views,
)
def test_linears(arithmetic, m, k, ns, dtype, with_biases, relu, norm, view):
    check_linears(arithmetic, (m,), k, ns, dtype, with_biases, relu, norm, view)


@settings(deadline=None, max_examples=60)
@given(
    arithmetics,
    rows,
    st.lists(depths, min_size=1, max_size=4),
    outputs,
    st.sampled_from(DTYPES),
    *[st.booleans()] * 2,
    views,
)
def test_linear_sum(arithmetic, m, ks, n, dtype, with_bias, with_residual, view):
    check_linear_sum(arithmetic, (m,), ks, n, dtype, with_bias, with_residual, view)


@settings(deadline=None, max_examples=80)
@given(
    arithmetics,
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 32, 33, 50]),
    st.lists(depths, min_size=1, max_size=4),
    outputs | st.sampled_from([511, 512, 1025]),  # from 512 on a group of units is divided by outputs
    st.sampled_from(DTYPES),
    *[st.booleans()] * 2,
    views,
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_by_unit(arithmetic, m, ks, n, dtype, with_bias, with_residual, view, zeros):
    """Weights stored as (k, n), in rows that may be parts of longer ones; inputs of which a share is 0."""
    xs = [random(1 + i, m, k) / k**0.5 for i, k in enumerate(ks)]
    xs = [torch.where(torch.rand(x.shape) < zeros, torch.zeros(()), x) for x in xs]
    weights = [random(5 + i, k, n + view, dtype=dtype)[:, view:].T for i, k in enumerate(ks)]
    bias = random(9, n, dtype=dtype) if with_bias else None
    residual = random(10, m, n) if with_residual else None
    exact = sum(x.double() @ weight.double().T for x, weight in zip(xs, weights, strict=True))
    exact = exact + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    skipping = arithmetic.linear_sum(xs, weights, bias, residual)
    assert_rounded(skipping, exact)
    whole = KernelArithmetic(variant=arithmetic.variant, skip_zeros=False).linear_sum(xs, weights, bias, residual)
    assert torch.equal(skipping.view(torch.int32), whole.view(torch.int32))  # signs of zeros, too


@settings(deadline=None, max_examples=60)
@given(
    arithmetics,
    rows,
    # A matrix of one unit is contiguous both ways.
    st.lists(depths.map(lambda k: max(k, 2)), min_size=1, max_size=3),
    (outputs | st.sampled_from([512, 1025])).map(lambda n: max(n, 2)),
    *[st.booleans()] * 4,
    views,
)
def test_int8(arithmetic, m, ks, n, by_unit, with_bias, with_residual, relu, view):
    """Products of int8 weights, as a sum of several and as several; outputs have a scale each, biases are float32."""
    xs = [random(1 + i, m, k) / k**0.5 for i, k in enumerate(ks)]
    weights = [(100 * random(5 + i, n, k + view)).clamp(-128, 127).to(torch.int8)[:, view:] for i, k in enumerate(ks)]
    scale, bias = random(8, n, 1).abs() + 0.01, random(9, n) if with_bias else None
    residual = random(10, m, n) if with_residual else None
    products = [(x.double() @ w.double().T) * scale.double().T for x, w in zip(xs, weights, strict=True)]
    added = torch.zeros(()) if bias is None else bias.double()
    exact = sum(products) + added + (0 if residual is None else residual.double())
    stored = [w.T.contiguous().T if by_unit else w for w in weights]
    assert_rounded(arithmetic.linear_sum(xs, stored, bias, residual, scale), exact, 1e-3)
    (y,) = arithmetic.linears(xs[0], weights[:1], None if bias is None else [bias], relu, scales=[scale])
    exact = products[0] + added
    assert_rounded(y, exact.relu() if relu else exact, 1e-3)


def test_int8_weights_need_scales():
    x, weight, scale = random(1, 2, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1)
    for scales in (None, torch.ones(4), torch.ones(3, 1), scale.double()):
        with pytest.raises(RuntimeError, match="scale"):
            KernelArithmetic().linear_sum([x], [weight], scale=scales)
    with pytest.raises(RuntimeError, match="with a scale"):
        KernelArithmetic().linear_sum([x], [weight.float()], scale=scale)


@pytest.mark.parametrize("by_unit", [False, True])
def test_many_rows(by_unit):
    x, weight = random(1, 17000, 20), random(2, 17, 20, dtype=torch.float16)
    stored = weight.T.contiguous().T if by_unit else weight
    for variant in variants():
        assert_rounded(KernelArithmetic(variant=variant).linear_sum([x], [stored]), x.double() @ weight.double().T)


@pytest.mark.parametrize(("rows", "zeros"), [(3, 0), (9, 20), (32, 20)])
def test_skipped_weights_are_not_read(rows, zeros):
    """NaN would show it; where any row needs the unit, it does. Of many rows, if few units are read."""
    x, weight = random(1, rows, 40), random(2, 40, 24, dtype=torch.float16)
    x[:, 7] = 0
    x[:, 10 : 10 + zeros] = 0
    x[1:, 30] = 0
    weight[7] = float("nan")
    for variant in variants():
        arithmetic = KernelArithmetic(variant=variant)
        assert arithmetic.linear_sum([x], [weight.T]).isfinite().all()
        weight[30] = float("inf")
        assert not arithmetic.linear_sum([x], [weight.T])[0].isfinite().any()
        weight[30] = 1


def test_results_do_not_depend_on_threads():
    x, weight = random(1, 2, 3000).relu(), random(2, 3000, 1100, dtype=torch.float16)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 8, 1):
        torch.set_num_threads(count)
        for _ in range(20):
            results.append(KernelArithmetic().linear_sum([x], [weight.T]))
            results.append(KernelArithmetic().linear_sum([x], [weight.T.contiguous()]))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[i % 2]) for i, result in enumerate(results))


@settings(deadline=None, max_examples=60)
@given(
    arithmetics,
    st.integers(1, 20),
    st.sampled_from([1, 3, 15, 16, 17, 100, 2001]),
    norms.filter(lambda norm: norm is not None),
)
def test_layer_norm(arithmetic, m, n, norm):
    x = random(1, 2, m, n)
    parameters = (random(7, n), random(8, n)) if norm == "affine" else (None, None)
    exact = torch.nn.functional.layer_norm(x.double(), (n,), *(p if p is None else p.double() for p in parameters))
    assert_rounded(arithmetic.layer_norm(x, kernels.LayerNorm(*parameters)), exact, 1e-4)


@settings(deadline=None, max_examples=100)
@given(st.data(), arithmetics, st.integers(1, 5), st.sampled_from([1, 7, 16, 17, 100, 5000]), st.booleans())
def test_best(data, arithmetic, b, n, ties):
    logits = random(data.draw(st.integers(0, 99)), b, n + 3)[:, :n]
    if ties:
        logits = logits.round()
    suppressed = torch.tensor(data.draw(st.lists(st.integers(-1, n - 1), min_size=2 * b, max_size=2 * b)))
    suppressed = suppressed.int().reshape(b, 2)
    k = data.draw(st.sampled_from([k for k in (1, 2, 5, 256) if k <= n]))
    masked = logits.clone()
    for row, ids in zip(masked, suppressed.tolist(), strict=True):
        row[[token for token in ids if token >= 0]] = MASKED
    expected, tokens = masked.sort(dim=-1, descending=True, stable=True)
    found, places = arithmetic.best(logits, k, suppressed)
    assert torch.equal(found, expected[:, :k]) and torch.equal(places.long(), tokens[:, :k])


@pytest.mark.parametrize("k", [1, 4])
def test_best_of_what_is_not_finite(k):
    """As argmax has it: the first NaN."""
    for variant in variants():
        logits = random(1, 3, 100)
        logits[0, 60] = logits[0, 70] = float("nan")
        logits[1, 30] = float("inf")
        logits[2] = -float("inf")
        tokens = KernelArithmetic(variant=variant).best(logits, k)[1][:, 0].tolist()
        assert tokens == [60, 30, 0] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("rows", [1, 7, 60])
def test_together_and_apart_are_the_same_to_the_bit(rows):
    arithmetic, x = KernelArithmetic(), random(1, rows, 40)
    weights = [random(2 + i, n, 40, dtype=torch.float16) for i, n in enumerate([5, 100, 16, 1])]
    for result, weight in zip(arithmetic.linears(x, weights), weights, strict=True):
        assert torch.equal(result, arithmetic.linears(x, [weight])[0])


@pytest.mark.parametrize("rows", [1, 50])
def test_linear_leaves_what_is_not_finite_to_who_asked(rows):
    x, weight = random(1, rows, 20), random(2, 30, 20, dtype=torch.float16)
    weight[3, 19] = float("inf")
    weight[4, 0] = float("nan")
    y = KernelArithmetic().linears(x, [weight], relu=True)[0]
    expected = torch.relu(x @ weight.float().T)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y.isfinite().sum() >= 28 * rows


def test_linear_takes_any_number_of_leading_dimensions():
    x, weight = random(1, 2, 3, 20), random(2, 5, 20, dtype=torch.float16)
    assert_rounded(KernelArithmetic().linears(x, [weight])[0], x.double() @ weight.double().T)
    assert KernelArithmetic().linears(x[:0], [weight])[0].shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": [random(1, 2, 9)]}, "weight is not a matrix of contiguous rows with 9 inputs, torch.float16"),
        ({"xs": [random(1, 8, 2).T]}, "x is not contiguous float32"),
        ({"xs": [random(1, 2, 8).half()]}, "x is not contiguous float32"),
        ({"xs": []}, "0 xs and 1 weights"),
        ({"weights": [random(2, 8, 9).half()[:, :8:2].T]}, "contiguous rows with 8 inputs, torch.float16"),
        ({"weights": [torch.ones(4, 8, dtype=torch.int32)]}, "weight is torch.int32, not float16"),
        (
            {"xs": [random(1, 2, 8)] * 2, "weights": [torch.ones(4, 8).half(), torch.ones(4, 8)]},
            "rows with 8 inputs, torch.float16",
        ),
        (
            {"xs": [random(1, 2, 8)] * 2, "weights": [torch.ones(4, 8).half(), torch.ones(5, 8).half()]},
            "not all .2, 4.",
        ),
        ({"bias": random(3, 4)}, "bias is not contiguous"),
        ({"bias": random(3, 5).half()}, "bias is not contiguous"),
        ({"residual": random(4, 1, 4)}, "residual is not contiguous float32"),
        ({"residual": random(4, 2, 4).half()}, "residual is not contiguous float32"),
    ],
)
def test_linear_sum_refuses(change, message):
    x, weight, bias = random(1, 2, 8), random(2, 4, 8).half(), random(3, 4).half()
    given = {"xs": [x], "weights": [weight], "bias": bias, "residual": random(4, 2, 4)} | change
    with pytest.raises(RuntimeError, match=message):
        KernelArithmetic().linear_sum(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": [random(3, 4).half()] * 2}, "1 weights, 2 biases, 0 scales"),
        ({"biases": [random(3, 5).half()]}, "bias is not contiguous torch.float16 .4"),
        ({"weights": []}, "0 weights, 0 biases, 0 scales"),
        ({"weights": [torch.ones(4, 8).half(), torch.ones(4, 8)]}, "rows with 8 inputs, torch.float16"),
    ],
)
def test_linears_refuses(change, message):
    given = {"x": random(1, 2, 8), "weights": [random(2, 4, 8).half()]} | change
    with pytest.raises(RuntimeError, match=message):
        KernelArithmetic().linears(**given)


def attended(query, key, value, keys, values, slots, positions) -> torch.Tensor:
    """`KernelArithmetic.attend` with a scale of 0.3 in float64. The new tokens are in the cache already."""
    heads, d = keys.shape[1], keys.shape[3]
    rows = query.double().unflatten(1, (heads, d))
    exact = torch.empty(rows.shape, dtype=torch.float64)
    for token, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        k, v = (cache[slot, :, : position + 1].double() for cache in (keys, values))
        weights = torch.softmax(torch.einsum("hd,hcd->hc", rows[token], k) * 0.3, -1)
        exact[token] = torch.einsum("hc,hcd->hd", weights, v)
    return exact.flatten(1)


def check_attend(
    arithmetic: KernelArithmetic, runs: list[tuple[int, list[int]]], heads: int, d: int, dtype: torch.dtype
) -> None:
    """`runs` has slots and the positions of their new tokens; what is at other positions is in the cache already."""
    length = max(max(positions) for _, positions in runs) + 3
    shape = (max(slot for slot, _ in runs) + 2, heads, length + 3, d)
    keys, values = (random(seed, *shape, dtype=dtype)[:, :, :length] for seed in (1, 2))
    before, after = keys.clone(), (keys.clone(), values.clone())
    slots = torch.tensor([slot for slot, positions in runs for _ in positions])
    positions = torch.tensor([position for _, places in runs for position in places])
    query, key, value = (random(seed, len(slots), heads * d) for seed in (3, 4, 5))
    query /= max(d / 64, 1) ** 0.5
    for cache, new in zip(after, (key, value), strict=True):
        cache[slots, :, positions] = new.unflatten(1, (heads, d)).to(dtype)
    mixed = arithmetic.attend(query, key, value, keys, values, slots, positions, 0.3)
    assert_rounded(mixed, attended(query, key, value, *after, slots, positions))
    assert torch.equal(keys, after[0]) and torch.equal(values, after[1])
    assert not torch.equal(keys, before)


# At most, just below, at and just beyond what a block has of tokens (a multiple of 8, up to 64) and of keys (192), and
# few tokens, which are taken one by one.
counts = st.sampled_from([1, 2, 4, 5, 6, 8, 9, 16, 63, 64, 65, 130]) | st.integers(1, 40)
starts = st.sampled_from([0, 1, 14, 15, 16, 40, 176, 187, 191, 192, 193, 400])
sizes = st.sampled_from([1, 7, 16, 20, 64, 80, 128, 130])


@st.composite
def runs_of_tokens(draw) -> list[tuple[int, list[int]]]:
    """Up to four slots with new tokens: one behind the other, with gaps, or in any order."""
    runs = []
    for slot in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)):
        count, start = draw(counts), draw(starts)
        positions = list(range(start, start + count))
        order = draw(st.sampled_from(["adjacent", "adjacent", "gaps", "shuffled"]))
        if order == "gaps":
            positions = [position + (100 if i > count // 2 else 0) + 2 * i for i, position in enumerate(positions)]
        elif order == "shuffled":
            positions = draw(st.permutations(positions))
        runs.append((slot, positions))
    return runs


@settings(deadline=None, max_examples=60)
@given(arithmetics, runs_of_tokens(), st.integers(1, 5), sizes, st.sampled_from(DTYPES))
def test_attend(arithmetic, runs, heads, d, dtype):
    check_attend(arithmetic, runs, heads, d, dtype)


@pytest.mark.parametrize("variant", variants())
def test_attend_in_prompts(variant):
    """Several blocks of tokens and of keys, also where heads are too large for blocks."""
    for tokens, d in ((300, 64), (128, 64), (20, 1100)):
        check_attend(KernelArithmetic(variant=variant), [(1, list(range(tokens))), (0, [7])], 2, d, torch.float16)


def test_attend_in_more_pieces_than_a_call_takes():
    runs = [(slot, list(range(2))) for slot in range(40)] + [(40, list(range(70)))]
    check_attend(KernelArithmetic(), runs, 60, 3, torch.float32)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("count", [4, 16, 70])
def test_attend_does_not_depend_on_the_other_tokens_of_a_step(variant, count):
    """A token has the same result in a step of its own, up to rounding. Infinities of other tokens do not reach it."""
    arithmetic = KernelArithmetic(variant=variant)
    query, key, value = (random(seed, count, 64) for seed in (3, 4, 5))
    value[-1], key[-1] = torch.inf, torch.nan
    slots, positions = torch.ones(count, dtype=torch.long), 190 + torch.arange(count)
    keys, values = (random(seed, 2, 2, 300, 32) for seed in (1, 2))
    together = arithmetic.attend(query, key, value, keys.clone(), values.clone(), slots, positions, 0.3)
    for token in range(count):
        one = slice(token, token + 1)
        new = (query[one], key[one], value[one])
        alone = arithmetic.attend(*new, keys, values, slots[one], positions[one], 0.3)
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert together[:-1].isfinite().all() and not together[-1].isfinite().any()


@pytest.mark.parametrize("count", [4, 16])
def test_attend_reads_nothing_behind_a_token(count):
    """What a slot's last user left may be anything; 0 times infinity would be NaN."""
    keys, values = (torch.full((1, 2, 19, 8), float("inf"), dtype=torch.float16) for _ in "kv")
    query = key = value = random(1, count, 16)
    places = (torch.zeros(count, dtype=torch.long), torch.arange(count))
    assert KernelArithmetic().attend(query, key, value, keys, values, *places, 1.0).isfinite().all()
    assert keys[:, :, count:].isinf().all() and keys[:, :, :count].isfinite().all()


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [20, 1000])  # the calling thread writes few numbers itself; threads share many
def test_attend_writes_what_torch_rounds_to(variant, dtype, d):
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.99, 65520, 3.4e38, 1e-40, 2**-25]
    # All exponents, and ties of both 16-bit dtypes.
    spread = torch.arange(0, 2**32, 2**11 + 2**9, dtype=torch.int64).to(torch.int32).view(torch.float32)
    shuffled = spread[torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))]
    numbers = torch.cat([torch.tensor(special), shuffled])
    key, value = numbers[: 2 * 40 * 2 * d].view(2, 40, 2 * d)
    keys, values = (torch.zeros(1, 2, 40, d, dtype=dtype) for _ in "kv")
    places = (torch.zeros(40, dtype=torch.long), torch.arange(40))
    KernelArithmetic(variant=variant).attend(torch.zeros(40, 2 * d), key, value, keys, values, *places, 1.0)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for cache, new in ((keys, key), (values, value)):
        rounded = new.to(dtype).unflatten(1, (2, d)).transpose(0, 1)
        same = cache[0].view(bits) == rounded.contiguous().view(bits)
        assert (same | (cache[0].isnan() & rounded.isnan())).all()


@pytest.mark.parametrize(
    ("slot", "position"), [(2, 0), (-1, 0), (0, 9), (0, -1)], ids=["slot", "no slot", "position", "no position"]
)
def test_attend_refuses_what_is_outside_the_cache(slot, position):
    keys, values = (torch.zeros(2, 2, 9, 8) for _ in "kv")
    x = random(1, 1, 16)
    with pytest.raises(RuntimeError, match=f"token 0 is at slot {slot}, position {position}, outside the cache"):
        KernelArithmetic().attend(x, x, x, keys, values, torch.tensor([slot]), torch.tensor([position]), 1.0)
    assert not keys.any() and not values.any()


def test_many_python_threads_at_once():
    """Each gets its own results, whatever the others do; the number of threads changes in between."""
    x, weights = random(1, 2, 300).relu(), [random(2 + i, 300, 200, dtype=torch.float16) for i in range(4)]
    expected = [KernelArithmetic().linear_sum([x], [weight.T]) for weight in weights]
    wrong: list[int] = []

    def call(index: int) -> None:
        arithmetic = KernelArithmetic(variant=variants()[index % len(variants())])
        mine = arithmetic.linear_sum([x], [weights[index].T])
        for turn in range(300):
            if index == 0:
                torch.set_num_threads(1 + turn % 4)
            result = arithmetic.linear_sum([x.clone()], [weights[index].T])
            if not torch.equal(result, mine):
                wrong.append(index)

    before = torch.get_num_threads()
    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert not wrong
    for weight, result in zip(weights, expected, strict=True):
        assert torch.equal(KernelArithmetic().linear_sum([x], [weight.T]), result)


def test_inputs_that_go_while_threads_are_late():
    """Tensors are freed after each call, on cores that are too few; late threads must not need them."""
    torch.set_num_threads(8)
    for turn in range(300):
        x, weight = random(turn, 1, 2000), random(turn % 7, 64, 2000, dtype=torch.float16)
        assert_rounded(KernelArithmetic().linears(x, [weight])[0], x.double() @ weight.double().T, 1e-4)
        del x, weight
    deadline = time.monotonic() + 30
    while kernels._kept and time.monotonic() < deadline:
        KernelArithmetic().linears(random(0, 1, 8), [random(1, 4, 8)])
    assert not kernels._kept


FORK = """
import os, sys, threading, torch
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic
torch.set_num_threads(3)
x, weight = torch.randn(2, 500), torch.randn(400, 500).half()
run = lambda: KernelArithmetic().linears(x, [weight])[0]
expected, stop = run(), threading.Event()
def calls():
    while not stop.is_set():
        run()
others = [threading.Thread(target=calls) for _ in range(2)]  # they may be in a call when the process is forked
for other in others:
    other.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(run(), expected) for _ in range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(run(), expected)
stop.set()
"""


def test_a_forked_process_computes_too():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_environment_names_a_variant(monkeypatch):
    for variant in variants():
        monkeypatch.setenv(VARIANT_VARIABLE, variant)
        assert chosen_variant() == variant == KernelArithmetic().variant
    monkeypatch.setenv(VARIANT_VARIABLE, "mmx")
    with pytest.raises(TargetError, match="OPTIMUM_OPT_TRN_KERNELS=mmx: this processor and build have .*Unset it"):
        chosen_variant()


def test_without_kernels_one_warning_names_the_way_out(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_kernels", None)
    kernels.logger.warning_once.cache_clear()
    assert variants() == () and chosen_variant() is None and chosen_variant() is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "install g++" in messages[0] and "eagerly" in messages[0]
    kernels.logger.warning_once.cache_clear()


THREADS = """
import pathlib, time, torch
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic
KernelArithmetic().linears(torch.ones(1, 2000), [torch.ones(4096, 2000)])
time.sleep(1)  # threads name themselves when they run
print([file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")].count("opt-kernels"))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("count", [1, 2])  # torch takes no more than there are cores
def test_omp_num_threads_says_how_many_threads(count):
    environment = os.environ | {"OMP_NUM_THREADS": str(count)}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == count - 1
