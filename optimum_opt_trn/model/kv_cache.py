"""The key/value cache: tensors of a fixed size, a slot for each row of the batch.

A sequence lives in one slot from position 0. Which positions are valid is known to the caller alone, who passes each
new token's position to the rank program; nothing is cleared between calls, since a prompt overwrites what it reads.
The callers' view of it, a transformers `Cache`, is in `slots.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from .parallel import RankGroup
from .shapes import cache_shape


__all__ = ["LayerCache", "allocate_cache", "cache_shape"]


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
