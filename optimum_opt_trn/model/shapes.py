"""The sizes of a model, and how its tensors are cut over ranks. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Protocol


class ModelShape(Protocol):
    """What config.json says about the sizes of tensors: an `OPTConfig`, or a plan's `OPTShape`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def word_embed_proj_dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def do_layer_norm_before(self) -> bool: ...
    @property
    def _remove_final_layer_norm(self) -> bool: ...
    @property
    def layer_norm_elementwise_affine(self) -> bool: ...
    @property
    def enable_bias(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def activation_function(self) -> str: ...


class CacheSize(Protocol):
    """What decides the size of a cache: an `OPTNeuronConfig`, or a plan's `Setup`."""

    @property
    def batch_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def tp_degree(self) -> int: ...


# The end of a tensor's name -> the dimension that is cut. All other tensors are copied to every rank: layernorms,
# positions, project_in, project_out, and of row-parallel products the biases, which are added once, after the sum, and
# the scales of int8 weights.
SHARD_DIMS = {
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "lm_head.weight_scale": 0,
    "self_attn.q_proj.weight": 0,
    "self_attn.q_proj.weight_scale": 0,
    "self_attn.q_proj.bias": 0,
    "self_attn.k_proj.weight": 0,
    "self_attn.k_proj.weight_scale": 0,
    "self_attn.k_proj.bias": 0,
    "self_attn.v_proj.weight": 0,
    "self_attn.v_proj.weight_scale": 0,
    "self_attn.v_proj.bias": 0,
    "self_attn.out_proj.weight": 1,
    "fc1.weight": 0,
    "fc1.weight_scale": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
}


def shard_dim(name: str) -> int | None:
    """The dimension in which the tensor `name` is cut over ranks; None if every rank has a copy."""
    return next((dim for end, dim in SHARD_DIMS.items() if name.endswith(end)), None)


def shard_range(size: int, rank: int, tp_degree: int) -> tuple[int, int, int]:
    """(start, stop, padding) of rank's part of a dimension of `size`.

    Parts are equal, `ceil(size / tp_degree)`; where the last ones reach beyond `size` (a vocabulary that does not
    divide), `padding` says by how much.
    """
    part = -(-size // tp_degree)
    start, stop = min(rank * part, size), min((rank + 1) * part, size)
    return start, stop, part - (stop - start)


def cache_shape(config: ModelShape, size: CacheSize) -> tuple[int, int, int, int]:
    """Shape of the keys (or values) that one rank holds of one layer."""
    head_size = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads // size.tp_degree
    return size.batch_size, heads, size.sequence_length, head_size
