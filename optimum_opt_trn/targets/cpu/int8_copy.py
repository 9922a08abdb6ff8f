"""Copies of matrices in int8, half as large or less, and how far products with them can be off.

By the Cauchy-Schwarz inequality that is the length of the difference of a row and its copy, times the length of what
it is multiplied with. Where that tells enough, the row itself need not be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...checkpoint.layout import TensorSpec
from ...checkpoint.quantization import quantize, scales


# Unit roundoffs. Relative to the lengths of both vectors, a float32 sum of k products is off by at most k / 4 of them
# here, as it has 4 parts or more (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); rounding a factor to
# bfloat16 adds one of those.
_FLOAT32, _BFLOAT16 = 2.0**-24, 2.0**-9
# Of float32 lengths, which are off by less: a bound that is too low would lose results.
_ROUNDED_UP = 1 + 1e-4
# Numbers that are copied at a time: with more, malloc returns their memory to the system each time.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Int8Copy:
    """A matrix in int8, `(out, in)`, and how it differs from the one that it was made of.

    Args:
        weight: int8 `(out, in)`.
        scale: float32 `(out, 1)`.
        error: float32 `(out,)`, the length of the difference of a row and its copy.
        length: float32 `(out,)`, that of a row of the matrix.
    """

    weight: Tensor
    scale: Tensor
    error: Tensor
    length: Tensor

    def bounds(self, rounded: bool = False) -> Tensor:
        """float32 `(out,)`: how far apart results can be, for an input of length 1.

        Args:
            rounded: whether factors may be rounded to bfloat16.
        """
        slack = (self.weight.shape[1] + 16) * _FLOAT32 + (4 * _BFLOAT16 if rounded else 0)
        return self.error + slack * (self.length + self.error)

    def rows(self, start: int, stop: int) -> Int8Copy:
        """The copy of some rows."""
        return Int8Copy(*(tensor[start:stop] for tensor in vars(self).values()))


class Screen:
    """What tells which units of an MLP a ReLU makes 0.

    Args:
        copies: of the weights of fc1, `(units, in)`, one for each local rank.
    """

    def __init__(self, copies: list[Int8Copy]):
        self.copies = copies
        # The kernels write to it how many calls come that read no copies, since too few units were 0.
        self.without = torch.zeros(1, dtype=torch.int64)

    @cached_property
    def errors(self) -> list[Tensor]:
        """How far apart sums can be, of each copy (`Int8Copy.bounds`)."""
        return [copy.bounds() for copy in self.copies]


def copy_specs(matrix: str, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors of a copy of `matrix`, `(rows, columns)`, in the order of `Int8Copy`'s, by the names in files."""
    return {
        f"{matrix}.weight_int8": TensorSpec((rows, columns), "int8"),
        f"{matrix}.weight_scale": TensorSpec((rows, 1), "f32"),
        f"{matrix}.error": TensorSpec((rows,), "f32"),
        f"{matrix}.length": TensorSpec((rows,), "f32"),
    }


class CopyMaker:
    """Makes a copy of a matrix, floating point `(out, in)`, some rows at a time."""

    def __init__(self, matrix: Tensor):
        self._rows = matrix.split(max(1, _AT_ONCE // matrix.shape[1]))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The pieces of the tensor `name`, one of `copy_specs`."""
        kind = name.rpartition(".")[2]
        if kind == "weight_int8":
            return (quantize(rows) for rows in self._rows)
        return iter([self._vectors[kind]])

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"weight_scale": [], "error": [], "length": []}
        for rows in self._rows:
            exact, scale = rows.float(), scales(rows)
            length = exact.norm(dim=1) * _ROUNDED_UP
            # The difference is off by two roundings of numbers of the row's size.
            error = (quantize(exact) * scale).sub_(exact).norm(dim=1) * _ROUNDED_UP + 4 * _FLOAT32 * length
            for made, part in zip(found.values(), (scale, error, length), strict=True):
                made.append(part)
        return {kind: torch.cat(parts) for kind, parts in found.items()}


def int8_copy(matrix: Tensor) -> Int8Copy:
    """The copy of a matrix, floating point `(out, in)`."""
    maker = CopyMaker(matrix)
    return Int8Copy(*(torch.cat(list(maker.chunks(name))) for name in copy_specs("matrix", *matrix.shape)))
