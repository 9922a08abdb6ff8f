"""The key/value cache, and attention over it in static shapes, which is what compilers for a device take.

The cache is tensors of a fixed size, with a slot for each row of the batch. A sequence lives in one slot from position
0. Only the caller knows which positions are valid, and passes each new token's position; nothing is cleared between
calls, since a prompt overwrites what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class StaticAttention:
    """An `Attend` for `n` new tokens in each of `b` slots, heads of size `d`.

    Args:
        keys, values: for each local rank, the first `c` positions of its cache, `(b, heads, c, d)`; changed in place.
        positions: int32 `(b, n)`, where in its slot each new token is; -1 throughout a row that is idle, whose slot
            stays as it is.
        prompt: whether the new tokens are a whole prompt, at positions 0 to n - 1 (the graph `context_encoding`).
            Otherwise each attends to what the cache holds up to its position.
        scale: what queries are multiplied with.
        compute_dtype: dtype that both factors of a product have; softmax is float32.
        window: how many of the first `c` positions are read, by default all. XLA rebuilds a whole tensor to write to a
            view of it, so there the cache is passed whole, and read in part.
    """

    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    prompt: bool
    scale: float
    compute_dtype: torch.dtype = torch.float32
    window: int | None = None

    def __call__(self, rank: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.keys[rank], self.values[rank]
        q, k, v = (x.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2) for x in (query * self.scale, key, value))
        write_cache(keys, k, self.positions, self.prompt)
        write_cache(values, v, self.positions, self.prompt)
        # A prompt attends to what later steps will read: keys and values as the cache rounds them.
        k, v = (k.to(keys.dtype), v.to(values.dtype)) if self.prompt else (keys, values)
        if self.window is not None and not self.prompt:
            k, v = k[:, :, : self.window], v[:, :, : self.window]
        seen = torch.arange(k.shape[2], dtype=torch.int32, device=q.device) <= self.positions[:, None, :, None]
        scores = self._matmul(q, k.transpose(-1, -2))
        scores = torch.where(seen, scores, torch.full_like(scores, MASKED))
        return self._matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).flatten(2)

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(left.to(self.compute_dtype), right.to(self.compute_dtype)).float()


def write_cache(cache: Tensor, new: Tensor, positions: Tensor, prompt: bool) -> None:
    """Writes `new` `(b, h, n, d)` to `cache` `(b, h, c, d)`: at the start of the slots, or at int32 `(b, n)`.

    Rows whose positions are -1 are idle, and left as they are.
    """
    busy = (positions >= 0)[:, None, :, None]
    if prompt:
        start = cache[:, :, : new.shape[2]]
        start.copy_(torch.where(busy, new.to(cache.dtype), start))
    else:
        # Adjacent indices: with a slice among them, XLA would transpose the whole cache and back.
        rows, heads = (torch.arange(size, dtype=torch.int32, device=cache.device) for size in cache.shape[:2])
        places = (rows[:, None, None], heads[:, None], positions.clamp(min=0)[:, None])
        cache[places] = torch.where(busy, new.to(cache.dtype), cache[places])
