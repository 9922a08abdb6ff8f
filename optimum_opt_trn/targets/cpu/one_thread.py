"""Torch operations that run on the calling thread only.

Torch splits larger operations over OpenMP threads. These spin for some milliseconds after each operation, and take
processor time from the kernels' threads. So a step calls torch on a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


# Element-wise operations on at most so many elements are not shared (torch, at::internal::GRAIN_SIZE).
MOST_ELEMENTS = 32768


def take_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """`matrix[rows]`, of a contiguous `(n, width)` and int64 `(m,)`. torch shares even that of 3000 elements."""
    taken = torch.empty(len(rows), matrix.shape[1], dtype=matrix.dtype)
    matrix.view(torch.uint8).numpy().take(rows.numpy(), 0, taken.view(torch.uint8).numpy(), "clip")
    return taken


def fill_rows(matrix: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
    """`matrix`, `(n, width)`, after some of its rows at a time became what `compute` returns for them."""
    most = max(1, MOST_ELEMENTS // matrix.shape[1])
    for first in range(0, len(matrix), most):
        rows = slice(first, first + most)
        matrix[rows] = compute(rows)
    return matrix
