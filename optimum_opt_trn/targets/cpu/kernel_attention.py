"""Attention by the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..packed_attention import PackedAttention
from .kernels import KernelArithmetic


@dataclass(frozen=True)
class KernelAttention(PackedAttention):
    """Attention by the kernels: all tokens of a step in one call."""

    kernels: KernelArithmetic

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `PackedAttention`."""
        return self.kernels.attend(query, key, value, keys, values, self.step.slots, self.step.positions, self.scale)
