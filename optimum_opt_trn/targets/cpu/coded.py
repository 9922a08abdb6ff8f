"""Coded copies of bfloat16 matrices: the same numbers in three quarters of the bytes (csrc/coded_format.h).

Memory is the limit of decoding, so that a step with few rows takes little more than three quarters of the time.
Nothing is lost: results are those of the matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import _kernels


# A row has a whole number of blocks of weights.
BLOCK: int = 0 if _kernels is None else _kernels.CODED_BLOCK


class CodedCopy(NamedTuple):
    """A matrix `(out, in)`, coded.

    Args:
        rows: int8 `(out, bytes)`, the codes of its rows; `(in, bytes)`, of its columns, if `by_unit`.
        by_unit: whether it lies by unit.
    """

    rows: Tensor
    by_unit: bool


class CodedCopies:
    """Coded copies, found by the matrices that they are of; these stay where they are."""

    def __init__(self) -> None:
        self._all: dict[int, tuple[Tensor, CodedCopy]] = {}

    def __setstate__(self, state: dict[str, dict[int, tuple[Tensor, CodedCopy]]]) -> None:
        # The matrices of a copied model lie elsewhere.
        self._all = {known[0].data_ptr(): known for known in state["_all"].values()}

    def add(self, matrix: Tensor, copy: CodedCopy) -> None:
        """From now on, `matrix`, bfloat16 `(out, in)`, has this copy."""
        rows, columns = matrix.T.shape if copy.by_unit else matrix.shape
        if matrix.dtype != torch.bfloat16 or columns % BLOCK or copy.rows.shape != (rows, coded_bytes(columns)):
            raise RuntimeError(f"{tuple(copy.rows.shape)} is no coded copy of {matrix.dtype} {tuple(matrix.shape)}")
        if copy.rows.dtype != torch.int8 or not copy.rows.is_contiguous():
            raise RuntimeError("a coded copy is not contiguous int8")
        self._all[matrix.data_ptr()] = matrix, copy

    def find(self, matrices: list[Tensor]) -> list[CodedCopy]:
        """The copies of all these matrices, which are alike; none if one has none."""
        found = [copy for matrix in matrices if (copy := self._of(matrix)) is not None]
        return found if len(found) == len(matrices) else []

    def _of(self, matrix: Tensor) -> CodedCopy | None:
        known, copy = self._all.get(matrix.data_ptr(), (None, None))
        # A part of a matrix can begin where all of it does.
        return copy if known is not None and known.shape == matrix.shape else None


def coded_bytes(columns: int) -> int:
    """Bytes of a row of so many weights, a multiple of BLOCK."""
    return _kernels.BLOCKS_BEGIN + columns // BLOCK * _kernels.BLOCK_BYTES


def can_encode(matrix: Tensor) -> bool:
    """Whether every row of a matrix, bfloat16 with contiguous rows, has a coded copy."""
    return bool(BLOCK) and matrix.shape[1] % BLOCK == 0 and _encode(matrix, None) == 0


def encode(matrix: Tensor) -> Tensor:
    """The coded rows, int8 `(rows, bytes)`, of a matrix that has them (`can_encode`)."""
    coded = torch.empty(matrix.shape[0], coded_bytes(matrix.shape[1]), dtype=torch.int8)
    if failed := _encode(matrix, coded):
        raise RuntimeError(f"{failed} rows cannot be coded")
    return coded


def _encode(matrix: Tensor, coded: Tensor | None) -> int:
    if matrix.dtype != torch.bfloat16 or matrix.stride(1) != 1:
        raise RuntimeError("a matrix to be coded is not bfloat16 with contiguous rows")
    (rows, columns), address = matrix.shape, 0 if coded is None else coded.data_ptr()
    return _kernels.encode(torch.get_num_threads(), rows, columns, matrix.stride(0), matrix.data_ptr(), address)
