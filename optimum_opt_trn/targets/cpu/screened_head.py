"""The best next token without reading the whole head: an int8 copy tells which words can have it.

The head is a large part of what a decoding step reads: 31 % of OPT-125M's bytes, 8 % of OPT-1.3B's. A copy in int8 is
half as large, and how far its logits can be off is known (int8_copy.py). The words whose logits can be the highest are
a handful. Their exact logits decide, so that the token is the one that all logits would have given, ties included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...model.parallel import Weights
from ...model.program import OPTRankProgram
from .int8_copy import Int8Copy
from .kernels import KernelArithmetic
from .one_thread import take_rows


# With more rows, arithmetic takes longer than reading the head.
MOST_ROWS = 16
# Of a row; with more, all logits are computed.
_MOST_CANDIDATES = 256


class ScreenedHead:
    """Finds the next token of rows that take the best one.

    Args:
        program: of a process with all ranks, whose arithmetic is of the kernels.
        weights: the head's.
        copy: of the head.
    """

    def __init__(self, program: OPTRankProgram, weights: Weights, copy: Int8Copy):
        assert isinstance(program.arithmetic, KernelArithmetic)
        self._program, self._weights, self._copy, self._arithmetic = program, weights, copy, program.arithmetic
        # Without rounded factors, and with.
        self._errors = [copy.bounds(rounded) for rounded in (False, True)]

    def best(self, hidden: Tensor) -> Tensor | None:
        """float32 `(rows, hidden)` → int32 `(rows,)`, the tokens with the highest logits, of equal ones the first.

        None where that cannot be told without all logits: with many rows or candidates, and if values are not finite.
        """
        if len(hidden) > MOST_ROWS:
            return None
        x = self._program.last_hidden_state(self._weights, hidden)
        lengths = x.norm(dim=-1)
        if not math.isfinite(float(lengths.sum())):
            return None
        (logits,) = self._arithmetic.linears(x, [self._copy.weight], scales=[self._copy.scale])
        errors = self._errors[self._arithmetic.rounds_factors()]
        words = self._arithmetic.candidates(logits, errors, lengths * (1 + 1e-6), _MOST_CANDIDATES)
        if words is None:
            return None
        candidates = torch.tensor(words)
        (exact,) = self._arithmetic.linears(x, [self._rows(candidates)])
        return candidates[exact.argmax(-1)].int()  # of equal ones argmax takes the first

    def _rows(self, words: Tensor) -> Tensor:
        """Rows of the head, `(n, dim)`, of int64 `(n,)`, ascending."""
        shards = self._weights["lm_head.weight"]
        if len(shards) == 1:
            return take_rows(shards[0], words)
        part = len(shards[0])
        return torch.cat(
            [take_rows(shard, words[words // part == rank] - rank * part) for rank, shard in enumerate(shards)]
        )
