"""Buckets: the static lengths that graphs exist for, and the one that serves a call.

A graph is the rank program at one static shape. `context_encoding` computes whole prompts, padded to a prompt bucket.
`token_generation` computes one new token a row, which attends to the first positions of the cache: a cache bucket. A
call is routed to the smallest bucket that fits.
"""

from __future__ import annotations

from collections.abc import Sequence


# Compilers treat a length of 1 as another kind of shape (it broadcasts), and the longest one needs shorter ones below.
SHORTEST_BUCKET = 2
SHORTEST_SEQUENCE = 4

# Neuron compiles each bucket separately, so that a few doubling ones are best.
NEURON_SMALLEST_BUCKET = 128

# Tokens a row that one run of the graph `speculation` takes; longer calls are cut, shorter ones filled up. The weights
# are read once for all of them, and a NeuronCore's matrix unit works on up to 128 rows at a time (awsdocs-neuron,
# "NeuronCore-v2 Architecture"), so that sixteen cost hardly more than one; assisted generation asks for 5 to 21
# (transformers' num_assistant_tokens, plus one).
EXTENSION = 16


def _doubling(longest: int, first: int) -> tuple[int, ...]:
    sizes = []
    while first < longest:
        sizes.append(first)
        first *= 2
    return (*sizes, longest)


def default_prompt_buckets(sequence_length: int, target: str) -> tuple[int, ...]:
    """Prompt lengths (tokens), ascending, the last `sequence_length`.

    On `cpu` there is only that one: kernels take any length, and no product includes padding.
    """
    if target == "cpu":
        return (sequence_length,)
    return _doubling(sequence_length, NEURON_SMALLEST_BUCKET)


def default_cache_buckets(sequence_length: int, target: str) -> tuple[int, ...]:
    """Cache lengths (positions), ascending, the last `sequence_length`."""
    return default_prompt_buckets(sequence_length, target)


def extension_length(sequence_length: int) -> int:
    """Tokens a row that one run of `speculation` takes."""
    return min(EXTENSION, sequence_length)


def check_buckets(option: str, buckets: Sequence[int], sequence_length: int) -> tuple[int, ...]:
    """`buckets` as a tuple.

    Raises:
        ValueError: unless they are whole numbers of at least 2, strictly ascending, and end with `sequence_length`.
    """
    sizes = tuple(buckets)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < SHORTEST_BUCKET for n in sizes):
        raise ValueError(f"{option}={list(sizes)} must be whole numbers of at least {SHORTEST_BUCKET}.")
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] != sequence_length:
        raise ValueError(
            f"{option}={list(sizes)} must ascend and end with sequence_length={sequence_length}, "
            f"for example {[*(n for n in sorted(set(sizes)) if n < sequence_length), sequence_length]}."
        )
    return sizes


def smallest_bucket(buckets: Sequence[int], length: int) -> int:
    """The smallest of `buckets` that holds `length`; ValueError if none does."""
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"{length} positions do not fit the largest bucket, {buckets[-1]}.")
