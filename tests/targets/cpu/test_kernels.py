"""The kernels against float64: any shape, every dtype, as views, and for every kind of vectors this host has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from against_transformers import assert_rounded, check_linear_sum, check_linears, norms, random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.targets.cpu.kernels import CompileError, KernelArithmetic, compile_kernels


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Below, at and beyond what a thread, a tile and a panel take at once; many_rows starts at 49.
ROWS = [1, 2, 3, 4, 7, 8, 9, 17, 48, 49, 56, 61]
OUTPUTS = [1, 3, 4, 15, 16, 17, 47, 48, 49, 100, 257]
DEPTHS = [1, 5, 15, 16, 17, 64, 100, 1023, 1025, 2100]


pytestmark = pytest.mark.usefixtures("kernels")


rows = st.sampled_from(ROWS) | st.integers(1, 70)
outputs = st.sampled_from(OUTPUTS) | st.integers(1, 300)
depths = st.sampled_from(DEPTHS) | st.integers(1, 300)
views = st.sampled_from([0, 3, 32])


@settings(deadline=None, max_examples=100)
@given(
    rows,
    depths,
    st.lists(outputs, min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    *[st.booleans()] * 2,
    norms,
    views,
)
def test_linears(m, k, ns, dtype, with_biases, relu, norm, view):
    check_linears(KernelArithmetic(), (m,), k, ns, dtype, with_biases, relu, norm, view)


@settings(deadline=None, max_examples=100)
@given(rows, st.lists(depths, min_size=1, max_size=4), outputs, st.sampled_from(DTYPES), *[st.booleans()] * 2, views)
def test_linear_sum(m, ks, n, dtype, with_bias, with_residual, view):
    check_linear_sum(KernelArithmetic(), (m,), ks, n, dtype, with_bias, with_residual, view)


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
        ({"xs": [random(1, 2, 9)]}, "weight is not a matrix of contiguous rows of 9, Half"),
        ({"xs": [random(1, 8, 2).T]}, "x is not contiguous float32"),
        ({"xs": [random(1, 2, 8).half()]}, "x is not contiguous float32"),
        ({"xs": []}, "0 xs and 1 weights"),
        ({"weights": [random(2, 8, 4).half().T]}, "weight is not a matrix of contiguous rows of 8, Half"),
        ({"weights": [torch.ones(4, 8, dtype=torch.int32)]}, "weight is Int, not float16"),
        ({"xs": [random(1, 2, 8)] * 2, "weights": [torch.ones(4, 8).half(), torch.ones(4, 8)]}, "rows of 8, Half"),
        (
            {"xs": [random(1, 2, 8)] * 2, "weights": [torch.ones(4, 8).half(), torch.ones(5, 8).half()]},
            "not all 2 4",
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
        ({"biases": [random(3, 4).half()] * 2}, "1 weights and 2 biases"),
        ({"biases": [random(3, 5).half()]}, "bias is not contiguous Half .4."),
        ({"weights": []}, "0 weights and 0 biases"),
        ({"weights": [torch.ones(4, 8).half(), torch.ones(4, 8)]}, "rows of 8, Half"),
    ],
)
def test_linears_refuses(change, message):
    given = {"x": random(1, 2, 8), "weights": [random(2, 4, 8).half()]} | change
    with pytest.raises(RuntimeError, match=message):
        KernelArithmetic().linears(**given)


def check_attend(
    slots: list[int], starts: list[int], counts: list[int], heads: int, d: int, dtype: torch.dtype
) -> None:
    """`counts[i]` new tokens in `slots[i]`, behind `starts[i]` that it holds."""
    length = max(start + count for start, count in zip(starts, counts, strict=True)) + 2
    shape = (max(slots) + 2, heads, length + 3, d)
    keys, values = (random(seed, *shape, dtype=dtype)[:, :, :length] for seed in (1, 2))
    before, after = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    places = [(slot, start + i) for slot, start, n in zip(slots, starts, counts, strict=True) for i in range(n)]
    query, key, value = (random(seed, len(places), heads * d) for seed in (3, 4, 5))
    rows = [x.double().unflatten(1, (heads, d)) for x in (query, key.to(dtype), value.to(dtype))]
    exact = torch.empty(len(places), heads, d, dtype=torch.float64)
    for token, (slot, position) in enumerate(places):
        for cache, row in zip(after, rows[1:], strict=True):
            cache[slot, :, position] = row[token].to(dtype)
        k, v = (cache[slot, :, : position + 1].double() for cache in after)
        weights = torch.softmax(torch.einsum("hd,hcd->hc", rows[0][token], k) * 0.3, -1)
        exact[token] = torch.einsum("hc,hcd->hd", weights, v)
    indices = [torch.tensor(column) for column in zip(*places, strict=True)]
    mixed = torch.ops.optimum_opt_trn.attend(query, key, value, keys, values, *indices, 0.3)
    assert_rounded(mixed, exact.flatten(1))
    assert torch.equal(keys, after[0]) and torch.equal(values, after[1])
    assert not torch.equal(keys, before[0])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_attend(data):
    slots = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True))
    starts = [data.draw(st.sampled_from([0, 1, 14, 15, 16, 40])) for _ in slots]
    counts = [data.draw(st.integers(1, 5)) for _ in slots]
    d = data.draw(st.sampled_from([1, 7, 16, 20, 64, 80, 128, 130]))
    check_attend(slots, starts, counts, data.draw(st.integers(1, 5)), d, data.draw(st.sampled_from(DTYPES)))


def test_attend_reads_nothing_behind_a_token():
    """What a slot's last user left may be anything; 0 times infinity would be NaN."""
    keys, values = (torch.full((1, 2, 9, 8), float("inf"), dtype=torch.float16) for _ in "kv")
    query = key = value = random(1, 4, 16)
    places = (torch.zeros(4, dtype=torch.long), torch.arange(4))
    assert torch.ops.optimum_opt_trn.attend(query, key, value, keys, values, *places, 1.0).isfinite().all()
    assert keys[:, :, 4:].isinf().all() and keys[:, :, :4].isfinite().all()


@pytest.mark.parametrize(
    ("slot", "position"), [(2, 0), (-1, 0), (0, 9), (0, -1)], ids=["slot", "no slot", "position", "no position"]
)
def test_attend_refuses_what_is_outside_the_cache(slot, position):
    keys, values = (torch.zeros(2, 2, 9, 8) for _ in "kv")
    x = random(1, 1, 16)
    with pytest.raises(RuntimeError, match=f"token 0 is at slot {slot}, position {position}, outside the cache"):
        torch.ops.optimum_opt_trn.attend(x, x, x, keys, values, torch.tensor([slot]), torch.tensor([position]), 1.0)
    assert not keys.any() and not values.any()


CHECK = """
import sys, itertools, torch
sys.path[:0] = sys.argv[1:]
from test_kernels import *
from optimum_opt_trn.targets.cpu.kernels import compile_kernels, load_kernels
load_kernels(compile_kernels())
for m, k, dtype in itertools.product([1, 3, 5, 8, 50], [15, 17, 1030], DTYPES):
    check_linears(KernelArithmetic(), (m,), k, [3, 49], dtype, True, True, "affine", 3)
    check_linear_sum(KernelArithmetic(), (m,), [k, 20], 49, dtype, True, True, 3)
for d, dtype in itertools.product([7, 20, 64], DTYPES):
    check_attend([1, 0], [17, 0], [2, 3], 3, d, dtype)
print("all of", torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_vectors(capability):
    """ATen's own variable has torch run as if the processor had no more."""
    here = os.path.dirname(__file__)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", CHECK, here, os.path.join(os.path.dirname(os.path.dirname(here)), "support")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all of ")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels.cached_assets_path", lambda *_: tmp_path / "file")
    with pytest.raises(CompileError, match="their cache cannot be written .*set HF_ASSETS_CACHE"):
        compile_kernels()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels.cached_assets_path", lambda *_: tmp_path)
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels._compiler", lambda: "false")
    with pytest.raises(CompileError, match="false failed"):
        compile_kernels()
    assert not list(tmp_path.iterdir())
