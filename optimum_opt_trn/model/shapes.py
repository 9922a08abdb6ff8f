"""How tensors are cut over ranks. Imports neither torch nor transformers, so that planning starts fast."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import OPTConfig

    from ..configuration_opt import OPTNeuronConfig


# The end of a tensor's name -> the dimension that is cut. All other tensors are copied to every rank: layernorms,
# positions, project_in, project_out, and the biases of row-parallel products, which are added once, after the sum.
SHARD_DIMS = {
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "self_attn.q_proj.weight": 0,
    "self_attn.q_proj.bias": 0,
    "self_attn.k_proj.weight": 0,
    "self_attn.k_proj.bias": 0,
    "self_attn.v_proj.weight": 0,
    "self_attn.v_proj.bias": 0,
    "self_attn.out_proj.weight": 1,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
}


def shard_dim(name: str) -> int | None:
    """The dimension in which the tensor `name` is cut over ranks; None if every rank has a copy."""
    return next((dim for end, dim in SHARD_DIMS.items() if name.endswith(end)), None)


def shard_range(size: int, rank: int, world_size: int) -> tuple[int, int, int]:
    """(start, stop, padding) of rank's part of a dimension of `size`.

    Parts are equal, `ceil(size / world_size)`; where the last ones reach beyond `size` (a vocabulary that does not
    divide), `padding` says by how much.
    """
    part = -(-size // world_size)
    start, stop = min(rank * part, size), min((rank + 1) * part, size)
    return start, stop, part - (stop - start)


def cache_shape(config: OPTConfig, neuron_config: OPTNeuronConfig) -> tuple[int, int, int, int]:
    """Shape of the keys (or values) that one rank holds of one layer."""
    head_size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads // neuron_config.tp_degree
    return neuron_config.batch_size, heads, neuron_config.sequence_length, head_size
