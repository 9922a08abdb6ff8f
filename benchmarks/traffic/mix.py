"""The requests: prompts and answers of log-uniform lengths, from one seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """Requests, all there from the beginning.

    Args:
        prompts: their tokens.
        lengths: how many new tokens each asks for.
    """

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def new_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest answer: a static batch may have both."""
        return max(map(len, self.prompts)) + max(self.lengths)


def make_mix(
    requests: int, prompts: tuple[int, int], answers: tuple[int, int], vocab_size: int, seed: int = 20261126
) -> Mix:
    """So many requests; `prompts` and `answers` are the shortest and the longest length, both included."""
    chance = random.Random(seed)

    def length(shortest: int, longest: int) -> int:
        drawn = math.exp(chance.uniform(math.log(shortest), math.log(longest + 1)))
        return min(int(drawn), longest)

    return Mix(
        [[chance.randrange(5, vocab_size) for _ in range(length(*prompts))] for _ in range(requests)],
        [length(*answers) for _ in range(requests)],
    )
