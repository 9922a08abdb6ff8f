"""Tensor parallelism: what ranks exchange. `shapes.py` says how tensors are cut over them.

A column-parallel weight is cut by rows of the `(out, in)` matrix: each rank computes some of the outputs (attention
heads, MLP units, words of the vocabulary), and nothing is exchanged. A row-parallel weight is cut by columns: each
rank computes a summand of every output, and the summands are added. The scheme is Megatron-LM's (Shoeybi et al., 2019,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import Arithmetic
from .shapes import SHARD_DIMS, shard_dim, shard_range


__all__ = ["SHARD_DIMS", "RankGroup", "Weights", "shard_dim", "shard_range"]

# Tensor name -> its shards, one for each local rank, or a single tensor that all ranks share.
Weights = dict[str, list[Tensor]]


@dataclass(frozen=True)
class RankGroup:
    """The ranks of this process, out of `tp_degree`.

    Args:
        tp_degree: the tensor-parallel degree.
        ranks: the local ranks. On `cpu` these are all ranks; on `neuron` one is traced, and its graph serves each.
        arithmetic: how the target computes.
        all_reduce: sums a tensor over the processes; None if this process has all ranks.
        all_gather: concatenates a tensor's last dimension over the processes; None if this process has all ranks.
        reduce_dtype: dtype in which `all_reduce` sums.
    """

    tp_degree: int = 1
    ranks: Sequence[int] = (0,)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    all_reduce: Callable[[Tensor], Tensor] | None = None
    all_gather: Callable[[Tensor], Tensor] | None = None
    reduce_dtype: torch.dtype = torch.float32

    def row(
        self,
        xs: list[Tensor],
        weights: list[Tensor],
        bias: list[Tensor] | None,
        residual: Tensor,
        scale: list[Tensor] | None = None,
    ) -> Tensor:
        """One float32 `(…, in / world)` for each local rank, `(out, in / world)` weights → float32 `(…, out)`.

        The bias, and the float32 residual `(…, out)`, are added once. int8 weights have a float32 scale `(out, 1)`.
        """
        shared, scaled = bias[0] if bias else None, scale[0] if scale else None
        if self.all_reduce is None:
            return self.arithmetic.linear_sum(xs, weights, shared, residual, scaled)
        total = self._reduce(self.arithmetic.linear_sum(xs, weights, scale=scaled))
        return residual + (total if shared is None else total + shared.float())

    def embedding(self, ids: Tensor, weights: list[Tensor], ranks: Tensor) -> Tensor:
        """int32 ids `(…)`, `(vocabulary / world, dim)` weights → float32 `(…, dim)`.

        `ranks`, int32 `(local ranks,)`, says which part of the vocabulary each local rank has. It is a tensor, since
        on `neuron` one traced program serves every rank.
        """
        if self.tp_degree == 1:
            return F.embedding(ids, weights[0]).float()
        parts = []
        for index, weight in enumerate(weights):
            local = ids - ranks[index] * weight.shape[0]
            zero = torch.zeros_like(local)
            held = (local >= zero) & (local < torch.full_like(local, weight.shape[0]))
            rows = F.embedding(torch.where(held, local, zero), weight).float()
            parts.append(torch.where(held.unsqueeze(-1), rows, torch.zeros_like(rows)))
        return self.sum(parts)

    def sum(self, parts: list[Tensor]) -> Tensor:
        """The sum over all ranks of the world."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return self._reduce(total) if self.all_reduce else total

    def gather(self, parts: list[Tensor]) -> Tensor:
        """The parts of all ranks of the world, concatenated in the last dimension."""
        joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return self.all_gather(joined) if self.all_gather else joined

    def _reduce(self, x: Tensor) -> Tensor:
        assert self.all_reduce is not None
        return self.all_reduce(x.to(self.reduce_dtype)).float()
