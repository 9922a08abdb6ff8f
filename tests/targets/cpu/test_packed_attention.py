"""Packed tokens attend as they do in static shapes, whichever way is taken."""

from __future__ import annotations

import pytest
import torch
from against_transformers import random
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.buckets import LONG_RUN
from optimum_opt_trn.model.arithmetic import Arithmetic
from optimum_opt_trn.model.attention import LayerCache, StaticAttention
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets import Step
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic
from optimum_opt_trn.targets.cpu.packed_attention import PackedAttention


SLOTS, HEADS, LENGTH, SIZE = 4, 2, 48, 8


def caches(dtype: torch.dtype) -> LayerCache:
    return LayerCache(*([random(seed, SLOTS, HEADS, LENGTH, SIZE, dtype=dtype)] for seed in (1, 2)))


def step(slots: torch.Tensor, positions: torch.Tensor) -> Step:
    return Step(
        torch.zeros(len(slots), dtype=torch.int32), slots, positions, torch.arange(0), SamplingInputs.greedy(0)
    )


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([KernelArithmetic(), Arithmetic()]), st.sampled_from([torch.float32, torch.float16]))
def test_as_in_static_shapes(data, arithmetic, dtype):
    """Row by row, and all rows packed."""
    slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    counts = [data.draw(st.sampled_from([1, 2, 5, LONG_RUN - 1, LONG_RUN, 24])) for _ in slots]
    starts = [data.draw(st.sampled_from([0, 1, 9, 24])) for _ in slots]
    query, key, value = (random(seed, sum(counts), HEADS * SIZE) for seed in (3, 4, 5))
    row_by_row, packed = caches(dtype), caches(dtype)
    expected, positions, begin = torch.empty_like(query), [], 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        rows = slice(begin, begin := begin + count)
        positions += range(start, start + count)
        one = [[cache[0][slot : slot + 1]] for cache in (row_by_row.keys, row_by_row.values)]
        places = torch.arange(start, start + count, dtype=torch.int32)[None]
        attend = StaticAttention(*one, places, prompt=start == 0, scale=0.5)
        expected[rows] = attend(0, *(x[None, rows] for x in (query, key, value)))[0]
    owners = torch.tensor(slots).repeat_interleave(torch.tensor(counts))
    attention = PackedAttention(step(owners, torch.tensor(positions)), 0.5, arithmetic)
    mixed = attention.over(packed)(0, query, key, value)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.keys[0], row_by_row.keys[0]) and torch.equal(packed.values[0], row_by_row.values[0])


@pytest.mark.parametrize("arithmetic", [KernelArithmetic(), Arithmetic()], ids=["kernels", "eager"])
@pytest.mark.parametrize("count", [1, LONG_RUN])
def test_what_a_slots_last_user_left_is_not_read(arithmetic, count):
    cache = caches(torch.float16)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("inf"))
    query, key, value = (random(seed, count, HEADS * SIZE) for seed in (3, 4, 5))
    attention = PackedAttention(
        step(torch.zeros(count, dtype=torch.long), torch.arange(count)),
        0.5,
        arithmetic,
    )
    assert attention.over(cache)(0, query, key, value).isfinite().all()
