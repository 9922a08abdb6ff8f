"""Attention of a step's packed tokens over the key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import Attend, LayerCache
from .base import Step


@dataclass(frozen=True)
class PackedAttention:
    """How the tokens of a step attend: slot by slot, each by products of matrices.

    Args:
        step: the tokens' slots and positions.
        scale: what queries are multiplied with.
        compute_dtype: dtype of both factors of a product; sums are float32.
    """

    step: Step
    scale: float
    compute_dtype: torch.dtype

    def over(self, cache: LayerCache) -> Attend:
        """For the layer of `cache`."""

        def attend(rank: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attend(query, key, value, cache.keys[rank], cache.values[rank])

        return attend

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Writes keys and values of the new tokens to the cache of a rank, and attends to what is there.

        Args:
            query, key, value: float32 `(t, heads * d)`.
            keys, values: `(slots, heads, length, d)`, changed in place.

        Returns:
            float32 `(t, heads * d)`.
        """
        mixed = torch.empty_like(query)
        for slot, tokens in self.step.runs:
            mixed[tokens] = self.attend_run(
                query[tokens], key[tokens], value[tokens], keys[slot], values[slot], self.step.positions[tokens]
            )
        return mixed

    def attend_run(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor
    ) -> Tensor:
        """`attend` for the tokens of one slot.

        Args:
            query, key, value: float32 `(t, heads * d)`.
            keys, values: of the slot, `(heads, length, d)`, changed in place.
            places: int64 `(t,)`, the tokens' positions.
        """
        q, k, v = (x.unflatten(-1, (len(keys), -1)).transpose(0, 1) for x in (query, key, value))
        keys[:, places], values[:, places] = k.to(keys.dtype), v.to(values.dtype)
        used = int(places[-1]) + 1
        # What later steps will read: keys and values as the cache rounds them.
        q, k, v = (x[None].to(self.compute_dtype) for x in (q, keys[:, :used], values[:, :used]))
        prompt = int(places[0]) == 0 and len(places) == used
        seen = None if prompt else torch.arange(used) <= places[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=prompt, scale=self.scale)
        return attended[0].transpose(0, 1).flatten(1)
