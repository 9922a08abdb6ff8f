"""Attention in static shapes, and what it writes to the cache; in a layer it is compared in test_program.py."""

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.model.attention import MASKED, StaticAttention, write_cache


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_write_cache(data, dtype):
    b, h, c, d = (data.draw(st.integers(1, limit)) for limit in (3, 3, 12, 4))
    n = data.draw(st.integers(1, c))
    new = random(0, b, h, n, d)
    places = [data.draw(st.permutations(range(c)))[:n] for _ in range(b)]
    for prompt in (True, False):
        cache = random(1, b, h, c, d).to(dtype)
        expected = cache.clone()
        rows = [range(n)] * b if prompt else places
        for row in range(b):
            for i, place in enumerate(rows[row]):
                expected[row, :, place] = new[row, :, i].to(dtype)
        write_cache(cache, new, torch.tensor(places, dtype=torch.int32), prompt)
        assert torch.equal(cache, expected)


def test_write_cache_through_a_view():
    whole = torch.zeros(2, 1, 8, 2)
    write_cache(whole[:, :, :5], torch.ones(2, 1, 1, 2), torch.tensor([[4], [0]], dtype=torch.int32), prompt=False)
    assert whole[:, 0, :, 0].tolist() == [[0, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_masked_positions_weigh_nothing():
    assert torch.isfinite(torch.tensor(MASKED))
    assert torch.softmax(torch.tensor([0.0, MASKED]), -1).tolist() == [1, 0]


@pytest.mark.parametrize("prompt", [True, False])
def test_a_window_reads_as_much_of_a_whole_cache_as_a_view_of_it(prompt):
    query, key, value = (random(seed, 2, 3, 64) for seed in (1, 2, 3))
    positions = torch.tensor([[0, 1, 2], [0, 1, 2]] if prompt else [[5, 6, 7], [9, 10, 11]], dtype=torch.int32)
    caches = [random(seed, 2, 4, 32, 16) for seed in (4, 5)]
    results = []
    for window in (12, None):
        keys, values = (cache.clone() for cache in caches)
        seen = (keys, values) if window else (keys[:, :, :12], values[:, :, :12])
        attend = StaticAttention([seen[0]], [seen[1]], positions, prompt, 0.25, window=window)
        results.append((attend(0, query, key, value), keys, values))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors(dtype):
    """As on Neuron: the factors of a product are rounded, softmax and results are float32."""
    query, key, value = (random(seed, 2, 1, 32) for seed in (1, 2, 3))
    positions = torch.tensor([[5], [8]], dtype=torch.int32)
    mixed = []
    for compute_dtype in (dtype, torch.float64):
        caches = [random(seed, 2, 2, 9, 16, dtype=dtype) for seed in (4, 5)]
        attend = StaticAttention([caches[0]], [caches[1]], positions, False, 0.25, compute_dtype)
        mixed.append(attend(0, query, key, value))
    assert mixed[0].dtype == torch.float32
    torch.testing.assert_close(*mixed, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert not torch.equal(*mixed)
