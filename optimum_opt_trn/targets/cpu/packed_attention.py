"""Attention of a step's packed tokens over the key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...buckets import LONG_RUN
from ...model.arithmetic import Arithmetic
from ...model.attention import Attend, LayerCache
from ..base import Step
from .kernels import KernelArithmetic


@dataclass(frozen=True)
class PackedAttention:
    """How the tokens of a step attend.

    Args:
        step: the tokens' slots and positions.
        scale: what queries are multiplied with.
        arithmetic: how products are computed; the kernels attend, too.
    """

    step: Step
    scale: float
    arithmetic: Arithmetic

    def over(self, cache: LayerCache) -> Attend:
        """For the layer of `cache`."""

        def attend(rank: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[rank], cache.values[rank]
            arithmetic, step = self.arithmetic, self.step
            if isinstance(arithmetic, KernelArithmetic) and step.longest < LONG_RUN:
                return arithmetic.attend(query, key, value, keys, values, step.slots, step.positions, self.scale)
            return self._slot_by_slot(query, key, value, keys, values)

        return attend

    def _slot_by_slot(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        for slot, tokens in self.step.runs:
            q, k, v = (x[tokens].unflatten(-1, (keys.shape[1], -1)).transpose(0, 1) for x in (query, key, value))
            places = self.step.positions[tokens]
            keys[slot, :, places], values[slot, :, places] = k.to(keys.dtype), v.to(values.dtype)
            used = int(places[-1]) + 1
            # What later steps will read: keys and values as the cache rounds them.
            q, k, v = (
                x[None].to(self.arithmetic.compute_dtype) for x in (q, keys[slot, :, :used], values[slot, :, :used])
            )
            prompt = int(places[0]) == 0 and len(places) == used
            seen = None if prompt else torch.arange(used) <= places[:, None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=prompt, scale=self.scale)
            mixed[tokens] = attended[0].transpose(0, 1).flatten(1)
        return mixed
