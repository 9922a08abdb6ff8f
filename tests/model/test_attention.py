"""Attention in static shapes, and what it writes to the cache; in a layer it is compared in test_program.py."""

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.model.attention import MASKED, StaticAttention, write_tokens


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_write_tokens(data, dtype):
    b, h, c, d = (data.draw(st.integers(1, limit)) for limit in (3, 3, 12, 4))
    n = data.draw(st.integers(1, c))
    new = random(0, b, h, n, d)
    places = [data.draw(st.permutations(range(c)))[:n] for _ in range(b)]
    idle = data.draw(st.lists(st.booleans(), min_size=b, max_size=b))
    cache = random(1, b, h, c, d).to(dtype)
    before, expected = cache.clone(), cache.clone()
    for row in range(b):
        for i, place in enumerate(places[row]):
            if not idle[row]:
                expected[row, :, place] = new[row, :, i].to(dtype)
    positions = torch.tensor([[-1] * n if idle[row] else places[row] for row in range(b)], dtype=torch.int32)
    assert torch.equal(write_tokens(cache, new, positions), expected)
    assert torch.equal(cache, before)


def test_masked_positions_weigh_nothing():
    assert torch.isfinite(torch.tensor(MASKED))
    assert torch.softmax(torch.tensor([0.0, MASKED]), -1).tolist() == [1, 0]


def attention(caches, positions, **options) -> StaticAttention:
    return StaticAttention(caches and [caches], positions, head_size=16, scale=0.25, **options)


def test_a_window_reads_as_much_of_a_whole_cache_as_a_view_of_it():
    query, key, value = (random(seed, 2, 3, 64) for seed in (1, 2, 3))
    positions = torch.tensor([[5, 6, 7], [9, 10, 11]], dtype=torch.int32)
    keys, values = (random(seed, 2, 4, 32, 16) for seed in (4, 5))
    whole = attention((keys, values), positions, window=12)(0, query, key, value)
    assert torch.equal(whole, attention((keys[:, :, :12], values[:, :, :12]), positions)(0, query, key, value))


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([torch.float32, torch.float16]))
def test_new_and_cached_positions_are_one_sequence(data, dtype):
    """As one softmax over all positions of a slot that already holds the new tokens; with idle and shorter rows."""
    b, n, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), 24
    query, key, value = (random(seed, b, n, 64) for seed in (1, 2, 3))
    keys, values = (random(seed, b, 4, c, 16, dtype=dtype) for seed in (4, 5))
    starts = [data.draw(st.integers(0, c - n)) for _ in range(b)]
    counts = [data.draw(st.integers(0, n)) for _ in range(b)]
    rows = zip(starts, counts, strict=True)
    positions = [[start + min(i, count - 1) if count else -1 for i in range(n)] for start, count in rows]
    for row, count in enumerate(counts):  # a shorter row repeats its last token
        for x in (query, key, value):
            x[row, count:] = x[row, count - 1].clone() if count else x[row, count:]
    at = torch.tensor(positions, dtype=torch.int32)
    attend = attention((keys, values), at, cache_dtype=dtype)
    mixed = attend(0, query, key, value)
    whole = [write_tokens(cache, x, at) for cache, x in zip((keys, values), attend.new[0], strict=True)]
    for row, count in enumerate(counts):
        for i in range(count):
            k, v = (x[row, :, : positions[row][i] + 1].double() for x in whole)
            q = query[row, i].double().view(4, 1, 16) * 0.25
            expected = (torch.softmax(q @ k.mT, -1) @ v).flatten()
            torch.testing.assert_close(mixed[row, i].double(), expected, rtol=0, atol=1e-5)


def test_a_prompt_reads_no_cache():
    query, key, value = (random(seed, 1, 6, 64) for seed in (1, 2, 3))
    positions = torch.arange(6, dtype=torch.int32)[None]
    dirty = tuple(torch.full((1, 4, 32, 16), 7.0) for _ in range(2))
    torch.testing.assert_close(
        attention(None, positions)(0, query, key, value), attention(dirty, positions)(0, query, key, value)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors(dtype):
    """As on Neuron: the factors of a product are rounded, softmax and results are float32."""
    query, key, value = (random(seed, 2, 1, 32) for seed in (1, 2, 3))
    positions = torch.tensor([[5], [8]], dtype=torch.int32)
    mixed = []
    for compute_dtype in (dtype, torch.float64):
        caches = [random(seed, 2, 2, 9, 16, dtype=dtype) for seed in (4, 5)]
        attend = attention(caches, positions, cache_dtype=dtype, compute_dtype=compute_dtype)
        mixed.append(attend(0, query, key, value))
    assert mixed[0].dtype == torch.float32
    torch.testing.assert_close(*mixed, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert not torch.equal(*mixed)
