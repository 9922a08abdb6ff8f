"""The best next token without reading the whole head: an int8 copy tells which words can have it.

The head is a large part of what a decoding step reads: 31 % of OPT-125M's bytes, 8 % of OPT-1.3B's. A copy in int8 is
half as large, and how far its logits can be off is known: by the Cauchy-Schwarz inequality at most by the length of
the difference of a word's two rows times that of the hidden state. The words whose logits can be the highest are a
handful. Their exact logits decide, so that the token is the one that all logits would have given, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.quantization import quantize, scales
from ...model.parallel import Weights
from ...model.program import OPTRankProgram
from .kernels import KernelArithmetic


# The tensors of a copy, as `copy_rows` makes them.
WEIGHT, SCALE, ERROR, LENGTH = (f"lm_head.{name}" for name in ("weight_int8", "weight_scale", "error", "length"))

# With more rows, arithmetic takes longer than reading the head.
MOST_ROWS = 16
# Of a row; with more, all logits are computed.
_MOST_CANDIDATES = 256

# Unit roundoffs. Relative to the lengths of both vectors, a float32 sum of k products is off by at most k / 4 of them
# here, as it has 4 parts or more (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); rounding a factor to
# bfloat16 adds one of those.
_FLOAT32, _BFLOAT16 = 2.0**-24, 2.0**-9


@dataclass(frozen=True)
class HeadCopy:
    """A head in int8, `(words, dim)`, and how it differs from the one that it was made of.

    Args:
        weight: int8 `(words, dim)`.
        scale: float32 `(words, 1)`.
        error: float32 `(words,)`, the length of the difference of a word's two rows.
        length: float32 `(words,)`, that of its row in the head.
    """

    weight: Tensor
    scale: Tensor
    error: Tensor
    length: Tensor


def copy_rows(name: str, head: Tensor, at_once: int) -> Iterator[Tensor]:
    """A tensor of the copy of `head`, floating point `(words, dim)`, so many rows at a time."""
    for rows in head.split(at_once):
        if name == WEIGHT:
            yield quantize(rows)
        elif name == SCALE:
            yield scales(rows)
        else:
            exact = rows.double()
            difference = exact if name == LENGTH else exact - quantize(rows) * scales(rows).double()
            # Rounded up: a bound that is too low would lose tokens.
            yield (difference.norm(dim=1) * (1 + 1e-6)).float()


class ScreenedHead:
    """Finds the next token of rows that take the best one.

    Args:
        program: of a process with all ranks, whose arithmetic is of the kernels.
        weights: the head's.
        copy: of the head.
    """

    def __init__(self, program: OPTRankProgram, weights: Weights, copy: HeadCopy):
        assert isinstance(program.arithmetic, KernelArithmetic)
        self._program, self._weights, self._copy, self._arithmetic = program, weights, copy, program.arithmetic
        # How far a logit and its approximation can be apart, for a hidden state of length 1: without rounded factors,
        # and with.
        dim = copy.weight.shape[1]
        rounding = [(dim + 16) * _FLOAT32, (dim + 16) * _FLOAT32 + 4 * _BFLOAT16]
        self._errors = [copy.error + slack * (copy.length + copy.error) for slack in rounding]

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
            return _copied(shards[0], words)
        part = len(shards[0])
        return torch.cat(
            [_copied(shard, words[words // part == rank] - rank * part) for rank, shard in enumerate(shards)]
        )


def _copied(matrix: Tensor, rows: Tensor) -> Tensor:
    """`matrix[rows]`, by one thread: torch would start OpenMP's, which then spin on the kernels' processors."""
    copied = torch.empty(len(rows), matrix.shape[1], dtype=matrix.dtype)
    matrix.view(torch.uint8).numpy().take(rows.numpy(), 0, copied.view(torch.uint8).numpy(), "clip")
    return copied
