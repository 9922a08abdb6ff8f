"""The buckets that exist, and the one that serves a call."""

import bisect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_opt_trn.buckets import (
    SHORTEST_SEQUENCE,
    check_buckets,
    default_cache_buckets,
    default_prompt_buckets,
    smallest_bucket,
)


lengths = st.integers(SHORTEST_SEQUENCE, 8192)
targets = st.sampled_from(["cpu", "trn1", "trn2"])


@settings(deadline=None)
@given(lengths, targets)
def test_default_buckets_are_valid(length, target):
    for option, make in (("prompt_buckets", default_prompt_buckets), ("cache_buckets", default_cache_buckets)):
        sizes = make(length, target)
        assert check_buckets(option, sizes, length) == sizes


@settings(deadline=None)
@given(lengths)
def test_neuron_buckets_are_few_and_at_most_double(length):
    sizes = default_prompt_buckets(length, "trn1")
    assert len(sizes) <= 7
    assert all(b <= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


@settings(deadline=None)
@given(st.sets(st.integers(2, 500), min_size=1), st.integers(1, 600))
def test_smallest_bucket_that_fits(sizes, length):
    ascending = sorted(sizes)
    index = bisect.bisect_left(ascending, length)
    if index < len(ascending):
        assert smallest_bucket(ascending, length) == ascending[index]
    else:
        with pytest.raises(ValueError, match=f"{length} positions do not fit the largest bucket, {ascending[-1]}"):
            smallest_bucket(ascending, length)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 64], "at least 2"),
        ([0, 64], "at least 2"),
        ([-8, 64], "at least 2"),
        ([16.0, 64], "whole numbers"),
        (["16", 64], "whole numbers"),
        ([True, 64], "whole numbers"),
        ([32, 16, 64], r"must ascend and end with sequence_length=64, for example \[16, 32, 64\]"),
        ([16, 16, 64], r"for example \[16, 64\]"),
        ([16, 32], r"for example \[16, 32, 64\]"),
        ([16, 64, 128], r"for example \[16, 64\]"),
        ([], r"for example \[64\]"),
    ],
)
def test_bad_buckets(sizes, message):
    with pytest.raises(ValueError, match=f"some_buckets=.*{message}"):
        check_buckets("some_buckets", sizes, 64)


def test_good_buckets_become_a_tuple():
    assert check_buckets("some_buckets", [2, 63, 64], 64) == (2, 63, 64)
    assert check_buckets("some_buckets", (64,), 64) == (64,)
