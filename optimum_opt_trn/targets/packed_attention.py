"""Attention of a step's packed tokens over the key/value cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import Attend, LayerCache
from ..model.parallel import RankGroup
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
        return self._mix(q, k, v, places)[0].transpose(0, 1).flatten(1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        """`(1, heads, n, d)` of tokens at int64 `places` `(n,)`, `(1, heads, used, d)` each → `(1, heads, n, d)`."""
        used = k.shape[2]
        prompt = int(places[0]) == 0 and len(places) == used
        seen = None if prompt else torch.arange(used) <= places[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=prompt, scale=self.scale)


@dataclass(frozen=True)
class RecordedAttention(PackedAttention):
    """Attention that keeps its weights.

    Args:
        weights: for each layer so far, float32 `(heads, n, used)` for each local rank and, within it, each run.
    """

    weights: list[list[Tensor]] = field(default_factory=list)

    def over(self, cache: LayerCache) -> Attend:
        """See `PackedAttention`."""
        self.weights.append([])
        return super().over(cache)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        scores = (q * self.scale @ k.transpose(-1, -2)).float()
        unseen = torch.arange(k.shape[2]) > places[:, None]
        weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1)
        self.weights[-1].append(weights[0])
        return weights.to(v.dtype) @ v

    def of_all_heads(self, group: RankGroup) -> list[list[Tensor]]:
        """For each layer and run, float32 `(heads of the model, n, used)`."""
        runs = len(self.step.runs)
        return [
            [group.gather([part.movedim(0, -1) for part in layer[run::runs]]).movedim(-1, 0) for run in range(runs)]
            for layer in self.weights
        ]
