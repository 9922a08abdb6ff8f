"""Packed tokens attend as they do in static shapes, whichever way is taken."""

from __future__ import annotations

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.model.attention import LayerCache, StaticAttention, write_tokens
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets import Step
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic
from optimum_opt_trn.targets.cpu.runtime import KernelAttention
from optimum_opt_trn.targets.packed_attention import PackedAttention


SLOTS, HEADS, LENGTH, SIZE = 4, 2, 48, 8


def caches(dtype: torch.dtype) -> LayerCache:
    return LayerCache(*([random(seed, SLOTS, HEADS, LENGTH, SIZE, dtype=dtype)] for seed in (1, 2)))


def step(slots: torch.Tensor, positions: torch.Tensor) -> Step:
    return Step(
        torch.zeros(len(slots), dtype=torch.int32), slots, positions, torch.arange(0), SamplingInputs.greedy(0)
    )


def attention_of(step: Step, with_kernels: bool) -> PackedAttention:
    if with_kernels:
        return KernelAttention(step, 0.5, torch.float32, KernelArithmetic())
    return PackedAttention(step, 0.5, torch.float32)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.booleans(), st.sampled_from([torch.float32, torch.float16]))
def test_as_in_static_shapes(data, with_kernels, dtype):
    """Row by row, and all rows packed."""
    slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    counts = [data.draw(st.sampled_from([1, 2, 4, 5, 8, 15, 16, 24])) for _ in slots]
    starts = [data.draw(st.sampled_from([0, 1, 9, 24])) for _ in slots]
    query, key, value = (random(seed, sum(counts), HEADS * SIZE) for seed in (3, 4, 5))
    row_by_row, packed = caches(dtype), caches(dtype)
    expected, positions, begin = torch.empty_like(query), [], 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        rows = slice(begin, begin := begin + count)
        positions += range(start, start + count)
        one = tuple(cache[0][slot : slot + 1] for cache in (row_by_row.keys, row_by_row.values))
        places = torch.arange(start, start + count, dtype=torch.int32)[None]
        attend = StaticAttention([one] if start else None, places, SIZE, 0.5, dtype)
        expected[rows] = attend(0, *(x[None, rows] for x in (query, key, value)))[0]
        for cache, new in zip(one, attend.new[0], strict=True):
            cache.copy_(write_tokens(cache, new, places))
    owners = torch.tensor(slots).repeat_interleave(torch.tensor(counts))
    attention = attention_of(step(owners, torch.tensor(positions)), with_kernels)
    mixed = attention.over(packed)(0, query, key, value)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.keys[0], row_by_row.keys[0]) and torch.equal(packed.values[0], row_by_row.values[0])


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("count", [1, 16])
def test_what_a_slots_last_user_left_is_not_read(with_kernels, count):
    cache = caches(torch.float16)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("inf"))
    query, key, value = (random(seed, count, HEADS * SIZE) for seed in (3, 4, 5))
    attention = attention_of(step(torch.zeros(count, dtype=torch.long), torch.arange(count)), with_kernels)
    assert attention.over(cache)(0, query, key, value).isfinite().all()
