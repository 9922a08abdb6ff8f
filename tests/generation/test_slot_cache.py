"""Caches and the slots that they own, on a runtime that only moves rows, and does so for real."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from optimum_opt_trn.generation.cache import SlotCache
from optimum_opt_trn.generation.engine import Engine
from optimum_opt_trn.targets import Runtime, Step, StepResult


BATCH, LENGTH = 6, 12


class Rows(Runtime):
    """A cache `(BATCH, LENGTH)` of numbers, and the copies that it was asked for."""

    def __init__(self) -> None:
        self.cache = torch.zeros(BATCH, LENGTH)
        self.copies: list[tuple[list[int], int]] = []
        self.interrupt = False

    def step(self, step: Step) -> StepResult:
        self.cache[step.slots, step.positions] = step.tokens.float()
        return StepResult(torch.empty(0), torch.empty(0))

    def copy(self, sources: Tensor, length: int) -> None:
        self.copies.append((sources.tolist(), length))
        if self.interrupt:
            raise KeyboardInterrupt
        self.cache[:, :length] = self.cache[sources.long(), :length]


def started(engine: Engine, rows: int) -> SlotCache:
    """A cache after its first step, of one token a row."""
    cache = SlotCache(engine, rows)
    write(cache, torch.zeros(rows, 1))
    return cache


def write(cache: SlotCache, numbers: torch.Tensor) -> None:
    cache.engine.step(cache, numbers.long(), torch.ones(numbers.shape, dtype=torch.bool), 1)


class Both:
    """A SlotCache and transformers' DynamicCache, written alike."""

    def __init__(self, engine: Engine, rows: int):
        self.ours, self.theirs = SlotCache(engine, rows), DynamicCache()
        self.written = 0

    def write(self, count: int = 1) -> None:
        numbers = torch.arange(self.written, self.written + self.ours.max_batch_size * count, dtype=torch.float)
        self.written += len(numbers)
        new = numbers.reshape(-1, count)
        write(self.ours, new)
        self.theirs.update(new[:, None, :, None], new[:, None, :, None], 0)

    def check(self) -> None:
        expected = self.theirs.layers[0].keys[:, 0, :, 0]
        runtime = self.ours.engine.runtime
        held = torch.stack([runtime.cache[slot, : expected.shape[1]] for slot in self.ours.rows])
        assert torch.equal(held, expected)
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        assert self.ours.lengths.tolist() == [expected.shape[1]] * len(expected)
        assert len(set(self.ours.rows)) == len(self.ours.rows) == len(expected)
        self.ours.check(self.ours.engine)


@pytest.fixture
def engine() -> Engine:
    return Engine(Rows(), BATCH, LENGTH)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_reordered_as_transformers_reorders(data):
    engine = Engine(Rows(), BATCH, LENGTH)
    rows = data.draw(st.integers(1, BATCH))
    other = started(engine, BATCH - rows) if rows < BATCH else None
    both = Both(engine, rows)
    both.write(2)
    for _ in range(data.draw(st.integers(1, 6))):
        beams = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        both.ours.reorder_cache(beams)
        both.theirs.reorder_cache(beams)
        both.check()
        if both.theirs.get_seq_length() > 2 and data.draw(st.booleans()):
            removed = data.draw(st.integers(0, both.theirs.get_seq_length() - 1))
            for cache in (both.ours, both.theirs) if removed else ():
                cache.crop(-removed)
        both.write()
        both.check()
    if other is not None:
        other.check(engine)


def test_a_permutation_moves_nothing(engine):
    both = Both(engine, 4)
    both.write(3)
    both.ours.reorder_cache(torch.tensor([3, 0, 2, 1]))
    both.theirs.reorder_cache(torch.tensor([3, 0, 2, 1]))
    both.check()
    assert engine.runtime.copies == []


def test_duplicates_copy_what_is_filled_alone(engine):
    both = Both(engine, 3)
    both.write(5)
    both.ours.reorder_cache(torch.tensor([1, 1, 1]))
    both.theirs.reorder_cache(torch.tensor([1, 1, 1]))
    both.check()
    ((sources, length),) = engine.runtime.copies
    assert length == 5 and sorted(sources[:3]) == [1, 1, 1] and sources[3:] == [3, 4, 5]


@pytest.mark.parametrize("picked", [[2, 0], [1], [True, False, True]])
def test_rows_selected_as_transformers_selects_them(picked, engine):
    both = Both(engine, 3)
    both.write(2)
    indices = torch.tensor(picked)
    both.ours.batch_select_indices(indices)
    both.theirs.batch_select_indices(indices)
    both.check()
    # The slots of dropped rows are free.
    started(engine, BATCH - len(both.ours.rows))
    both.ours.check(engine)


def test_rows_repeated_as_transformers_repeats_them(engine):
    both = Both(engine, 2)
    both.write(3)
    both.ours.batch_repeat_interleave(3)
    both.theirs.batch_repeat_interleave(3)
    both.check()
    assert both.ours.max_batch_size == 6
    with pytest.raises(ValueError, match="6 more rows do not fit the batch_size=6"):
        both.ours.batch_repeat_interleave(2)
    both.check()


@pytest.mark.parametrize("length", [0, 2, 4, 9, -1, -3, -9])
def test_cropped_as_transformers_crops(length, engine):
    both = Both(engine, 2)
    both.write(4)
    try:
        both.theirs.crop(length)
    except ValueError:  # transformers 5, of a number above 0
        with pytest.raises(ValueError, match="negative number"):
            both.ours.crop(length)
    else:
        both.ours.crop(length)
        # Beyond the first column, transformers 4.57 keeps some.
        assert both.ours.get_seq_length() == (both.theirs.get_seq_length() if length > -4 else 0)


def test_a_copy_is_a_cache_of_its_own(engine):
    both = Both(engine, 2)
    both.write(3)
    ours, theirs = copy.deepcopy(both.ours), copy.deepcopy(both.theirs)
    both.write(2)
    both.check()
    assert ours.get_seq_length() == theirs.get_seq_length() == 3
    held = torch.stack([engine.runtime.cache[slot, :3] for slot in ours.rows])
    assert torch.equal(held, theirs.layers[0].keys[:, 0, :, 0])
    assert not set(ours.rows) & set(both.ours.rows)
    # There is no room for a third, but its first is safe: the other gives way.
    lost = started(engine, 2)
    copy.deepcopy(both.ours)
    both.ours.check(engine)
    del lost


def test_an_interrupted_move_leaves_a_cache_that_says_so(engine):
    both = Both(engine, 2)
    both.write(3)
    other = started(engine, 1)
    engine.runtime.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        both.ours.reorder_cache(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="lost its slots"):
        both.ours.check(engine)
    other.check(engine)
    engine.runtime.interrupt = False
    again = Both(engine, 5)
    again.write(2)
    again.check()
    other.check(engine)


def test_slots_go_from_who_used_them_least_recently(engine):
    first, second = started(engine, 2), started(engine, 2)
    engine.slots.assign(first)  # what a call does that uses it
    third = started(engine, 3)
    first.check(engine)
    third.check(engine)
    with pytest.raises(ValueError, match="lost its slots to another call.*batch_size"):
        second.check(engine)
    with pytest.raises(ValueError, match="7 more rows"):
        started(engine, 7)
    first.check(engine)


def test_what_nobody_holds_is_free(engine):
    kept, dropped = started(engine, 2), started(engine, 4)
    assert set(kept.rows) | set(dropped.rows) == set(range(BATCH))
    del dropped
    gc.collect()
    started(engine, 4)
    kept.check(engine)


def test_slots_that_a_caller_counts_are_nobody_elses(engine):
    first, second = started(engine, 2), started(engine, 2)
    engine.slots.free([1])
    with pytest.raises(ValueError, match="lost its slots"):
        first.check(engine)
    second.check(engine)
    with pytest.raises(ValueError, match="another model"):
        second.check(Engine(Rows(), BATCH, LENGTH))


def test_a_cache_of_no_tokens_needs_no_slots(engine):
    cache = SlotCache(engine, 2)
    cache.check(engine)
    cache.batch_repeat_interleave(2)
    copied = copy.deepcopy(cache)
    assert cache.rows == copied.rows == [] and cache.max_batch_size == copied.max_batch_size == 4
    write(cache, torch.ones(4, 3))
    started(engine, BATCH)  # evicts it
    with pytest.raises(ValueError, match="lost its slots"):
        write(cache, torch.ones(4, 1))
    cache.reset()
    write(cache, torch.ones(4, 1))
    assert cache.lengths.tolist() == [1] * 4


def test_tokens_forgotten_by_the_mask(engine):
    cache = SlotCache(engine, 2)
    cache.append(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]]).bool())
    assert cache.lengths.tolist() == [3, 3]
    fewer = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    assert torch.equal(cache.remasked(fewer), fewer.bool())
    assert cache.lengths.tolist() == [3, 3]
    cache.keep(cache.remasked(fewer))
    assert cache.lengths.tolist() == [2, 3] and cache.get_seq_length() == 4
    for bad in ([[1, 1, 1, 0], [1, 1, 0, 1]], [[0, 1, 1, 1], [1, 1, 0, 1]], [[0, 0, 1, 0], [1, 1, 0, 1]]):
        with pytest.raises(ValueError, match="attention_mask differs"):
            cache.remasked(torch.tensor(bad))
    # Of more columns than it holds, or fewer, those are compared that both have.
    wider = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 1]])
    for width in (2, 3, 5):
        assert torch.equal(cache.remasked(wider[:, :width]), fewer[:, :width].bool())
        wrong = wider[:, :width].index_fill(1, torch.tensor([0]), 1)
        with pytest.raises(ValueError, match="attention_mask differs"):
            cache.remasked(wrong)
    assert cache.lengths.tolist() == [2, 3] and cache.get_seq_length() == 4
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_a_transformers_cache_whose_tensors_are_elsewhere(engine):
    cache = started(engine, 2)
    assert isinstance(cache, SlotCache) and cache and not cache.is_compileable
    assert cache.get_max_cache_shape() == cache.max_cache_len == LENGTH
    assert "slots=[0, 1]" in repr(cache)
    for use in (lambda: cache[0], lambda: list(cache), lambda: len(cache), lambda: cache.update(None, None, 0)):
        with pytest.raises(NotImplementedError):
            use()
