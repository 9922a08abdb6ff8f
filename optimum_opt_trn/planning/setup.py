"""What a plan is made for: the options of an export that decide about memory, and the sizes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..dtypes import DTYPES


if TYPE_CHECKING:
    from ..configuration_opt import OPTNeuronConfig


@dataclass(frozen=True)
class Setup:
    """The options that a plan is made for, named as in `OPTNeuronConfig`.

    Args:
        batch_size: slots of the cache.
        sequence_length: positions of a slot.
        tp_degree: ranks.
        amp: dtype of the weights that are not float32 in any case.
        weight_dtype: `int8` for the matrices of attention and MLP, and the head unless the source has that in another
            dtype (`checkpoint.layout.has_int8_head`); None for `amp`.
        kv_cache_dtype: dtype of the cache; by default `amp`.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    tp_degree: int = 1
    amp: str = "f16"
    kv_cache_dtype: str = ""
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.kv_cache_dtype:
            object.__setattr__(self, "kv_cache_dtype", self.amp)

    @classmethod
    def of(cls, neuron_config: OPTNeuronConfig) -> Setup:
        """The setup of an export."""
        return cls(
            neuron_config.batch_size,
            neuron_config.sequence_length,
            neuron_config.tp_degree,
            neuron_config.amp,
            neuron_config.kv_cache_dtype or "",
            neuron_config.weight_dtype,
        )

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of a product's factors on Neuron; int8 is converted to it."""
        return DTYPES[self.amp].bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of an element of the cache."""
        return DTYPES[self.kv_cache_dtype].bytes


@dataclass(frozen=True)
class OPTShape:
    """A `ModelShape`: what a config.json says about memory, with the defaults of transformers' OPTConfig."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    # 0 stands for hidden_size.
    word_embed_proj_dim: int = 0
    num_attention_heads: int = 12
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    activation_function: str = "relu"
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
