"""The key/value cache, and attention over it in static shapes, which is what compilers for a device take.

The cache is tensors of a fixed size, with a slot for each row of the batch. A sequence lives in one slot from position
0. Only the caller knows which positions are valid, and passes each new token's position; nothing is cleared between
calls, since a prompt overwrites what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from .parallel import RankGroup
from .shapes import cache_shape


# A layer calls its target with `(rank, query, key, value)`: the local rank, and float32 `(…, heads * d)` each of the
# new tokens. The target writes keys and values to the cache, and returns float32 `(…, heads * d)`.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Finite, since -inf in a mask makes NaN on Neuron; exp of it is 0 in float32.
MASKED = -1e30


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: for each local rank, keys and values `(batch_size, heads, sequence_length, head_size)`."""

    keys: list[Tensor]
    values: list[Tensor]


def allocate_cache(config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup) -> list[LayerCache]:
    """Zeroed caches of all layers, in `kv_cache_dtype`."""
    shape = cache_shape(config, neuron_config)

    def zeros() -> list[Tensor]:
        return [torch.zeros(shape, dtype=neuron_config.cache_dtype) for _ in group.ranks]

    return [LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers)]


@dataclass
class StaticAttention:
    """An `Attend` for `n` new tokens in each of `b` slots, heads of size `d`.

    It reads the cache and does not write it: scores of cached positions and of the new tokens are computed apart, so
    that no product waits for a write. `new` has what is to be written when the graph ends (`write_tokens`).

    Args:
        caches: for each local rank, keys and values `(b, heads, c, d)` of the first `c` positions, before this step;
            None for a prompt, which has nothing before it.
        positions: int32 `(b, n)`, where in its slot each new token is, ascending; -1 throughout an idle row. A row of
            fewer tokens repeats its last token at its position.
        head_size: d.
        scale: the factor of queries.
        cache_dtype: the dtype to which the cache rounds keys and values. New tokens see each other as rounded, too.
        compute_dtype: dtype that both factors of a product have; softmax is float32.
        window: how many of the `c` positions are read, by default all.
    """

    caches: list[tuple[Tensor, Tensor]] | None
    positions: Tensor
    head_size: int
    scale: float
    cache_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    window: int | None = None
    # By local rank: the new tokens' keys and values, `(b, heads, n, d)` in `cache_dtype`.
    new: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, rank: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query * self.scale, key, value))
        k, v = k.to(self.cache_dtype), v.to(self.cache_dtype)
        self.new[rank] = (k, v)
        scores = self._scores(q, k, self._seen_of_new())
        if self.caches is None:
            mixed = self._matmul(torch.softmax(scores, dim=-1), v)
        else:
            keys, values = (cache[:, :, : self.window] for cache in self.caches[rank])
            places = torch.arange(keys.shape[2], dtype=torch.int32, device=q.device)
            cached = self._scores(q, keys, places < self.positions[:, None, :1, None])
            # One softmax over both.
            best = torch.maximum(scores.amax(-1, keepdim=True), cached.amax(-1, keepdim=True))
            scores, cached = torch.exp(scores - best), torch.exp(cached - best)
            total = scores.sum(-1, keepdim=True) + cached.sum(-1, keepdim=True)
            mixed = self._matmul(cached / total, values) + self._matmul(scores / total, v)
        return mixed.transpose(1, 2).flatten(2)

    def _seen_of_new(self) -> Tensor:
        """Which new tokens (last dimension) each new token sees, bool `(b, 1, n, n)`: each position once."""
        seen = self.positions[:, None, None, :] <= self.positions[:, None, :, None]
        repeated = self.positions[:, 1:] == self.positions[:, :-1]
        counted = torch.cat([torch.ones_like(self.positions[:, :1], dtype=torch.bool), ~repeated], dim=1)
        return seen & counted[:, None, None, :]

    def _scores(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        scores = self._matmul(q, k.transpose(-1, -2))
        return torch.where(seen, scores, torch.full_like(scores, MASKED))

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(left.to(self.compute_dtype), right.to(self.compute_dtype)).float()


def write_tokens(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """`cache` `(b, h, c, d)` with `new` `(b, h, n, d)` at int32 positions `(b, n)`; the cache itself is not changed.

    Rows whose positions are -1 are idle, and left as they are.
    """
    # Comparing with a tensor: compared with a number, torch-xla makes 64-bit integers of both.
    busy = (positions >= torch.zeros_like(positions))[:, None, :, None]
    # An idle row writes its first position to itself. torch.scatter, as in optimum-neuron's cache, takes 32-bit
    # indices; index_put would compare them with a 64-bit zero.
    new = torch.where(busy, new.to(cache.dtype), cache[:, :, :1])
    return cache.scatter(2, positions.clamp(min=0)[:, None, :, None].expand_as(new), new)
