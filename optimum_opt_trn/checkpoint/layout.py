"""What an OPT checkpoint consists of: names, shapes and dtypes of its tensors, and the files of the split format.

`amp` in this module is the dtype that attention, MLP, embedding and head are stored in, a name in `dtypes.DTYPES`.
With `weight_dtype="int8"` the matrices of attention and MLP are int8, and have scales (quantization.py). The head is
int8, too, unless it is of a checkpoint whose matrices are int8 and whose head is not (`has_int8_head`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..dtypes import DTYPES
from ..model.shapes import ModelShape


INDEX_NAME = "model.safetensors.index.json"
# Where an export directory keeps its split checkpoint.
CHECKPOINT_DIR = "checkpoint"

# What the names of the OPT's tensors begin with in a model that has it as its language model, as BLIP-2.
LANGUAGE_MODEL = "language_model."

# The tensors outside of the decoder layers.
OUTER_FILE = "embeddings_and_head.safetensors"

_DECODER = "model.decoder."
TOKEN_EMBEDDINGS = f"{_DECODER}embed_tokens.weight"
HEAD = "lm_head.weight"

# What follows the name of an int8 matrix in that of its scales.
SCALE = "_scale"


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, broken, or not of the model that its config.json describes."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint.

    Args:
        shape: its full shape.
        dtype: a name in `dtypes.DTYPES`.
        made_of: the tensor of the source that it is made of, if that has another name: a head that is tied there.
    """

    shape: tuple[int, ...]
    dtype: str
    made_of: str | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].bytes


# The name of a file of the split format -> its tensors by their full names.
FileSpecs = dict[str, dict[str, TensorSpec]]


def canonical_name(name: str) -> str:
    """The name as transformers' OPTForCausalLM spells it.

    OPTModel's checkpoints lack the prefix `model.`; in a BLIP-2 there is another one before it.
    """
    name = name.removeprefix(LANGUAGE_MODEL)
    return f"model.{name}" if name.startswith("decoder.") else name


def layer_prefix(index: int) -> str:
    return f"{_DECODER}layers.{index}."


def layer_file(index: int) -> str:
    return f"layer_{index:03d}.safetensors"


def has_int8_head(config: ModelShape, weight_dtype: str | None) -> bool:
    """Whether the head is int8 in a checkpoint with this `weight_dtype`, made of one with this configuration, or its.

    It is if the source is not quantized, or has a head of its own that is quantized.
    """
    quantization = getattr(config, "quantization_config", None)
    if weight_dtype != "int8" or quantization is None:
        return weight_dtype == "int8"
    return not config.tie_word_embeddings and quantizes_head(quantization)


def quantizes_head(quantization: Any) -> bool:
    """Whether a `quantization_config` of compressed-tensors, from config.json, quantizes the layer `lm_head`."""
    if not isinstance(quantization, Mapping):  # of a model that transformers has loaded
        quantization = quantization.to_dict()
    groups = (quantization.get("config_groups") or {}).values()
    targets = [target for group in groups for target in group.get("targets") or ()]
    return not _names_head(quantization.get("ignore") or ()) and _names_head(targets)


def _names_head(patterns: Iterable[str]) -> bool:
    """Whether one of them means the head: they are names, classes, or `re:` with a pattern."""
    name = HEAD.removesuffix(".weight")
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, "Linear")
        for pattern in patterns
    )


def layer_specs(config: ModelShape, amp: str, weight_dtype: str | None = None) -> dict[str, TensorSpec]:
    """The tensors of one decoder layer, by their names within the layer."""
    hidden, ffn = config.hidden_size, config.ffn_dim
    specs = {}
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    for name, shape in {**linears, "fc1": (ffn, hidden), "fc2": (hidden, ffn)}.items():
        specs.update(_matrix(f"{name}.weight", TensorSpec(shape, weight_dtype or amp)))
        if config.enable_bias:
            specs[f"{name}.bias"] = TensorSpec(shape[:1], amp)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        specs.update(_layer_norm(name, config))
    return specs


def outer_specs(config: ModelShape, amp: str, weight_dtype: str | None = None) -> dict[str, TensorSpec]:
    """The tensors outside the layers, by their names in a Hugging Face checkpoint."""
    hidden, words, dim = config.hidden_size, config.vocab_size, config.word_embed_proj_dim
    specs = {
        TOKEN_EMBEDDINGS: TensorSpec((words, dim), amp),
        # Two more rows than positions: OPTLearnedPositionalEmbedding's offset.
        f"{_DECODER}embed_positions.weight": TensorSpec((config.max_position_embeddings + 2, hidden), "f32"),
    }
    if dim != hidden:
        specs[f"{_DECODER}project_in.weight"] = TensorSpec((hidden, dim), amp)
        specs[f"{_DECODER}project_out.weight"] = TensorSpec((dim, hidden), amp)
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        specs.update(_layer_norm(f"{_DECODER}final_layer_norm", config))
    int8, tied_to = has_int8_head(config, weight_dtype), TOKEN_EMBEDDINGS if config.tie_word_embeddings else None
    if int8 or not tied_to:
        specs.update(_matrix(HEAD, TensorSpec((words, dim), "int8" if int8 else amp, tied_to)))
    return specs


def _matrix(name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
    """A matrix, and if it is int8 its scales."""
    scales = {f"{name}{SCALE}": TensorSpec((spec.shape[0], 1), "f32", spec.made_of)} if spec.dtype == "int8" else {}
    return {name: spec, **scales}


def _layer_norm(name: str, config: ModelShape) -> dict[str, TensorSpec]:
    if not config.layer_norm_elementwise_affine:
        return {}
    return {f"{name}.{part}": TensorSpec((config.hidden_size,), "f32") for part in ("weight", "bias")}


def checkpoint_files(config: ModelShape, amp: str, weight_dtype: str | None = None) -> FileSpecs:
    """Every file of the split format, and its tensors by their full names, in the order of writing."""
    files = {OUTER_FILE: outer_specs(config, amp, weight_dtype)}
    layer = layer_specs(config, amp, weight_dtype)
    for index in range(config.num_hidden_layers):
        files[layer_file(index)] = {layer_prefix(index) + name: spec for name, spec in layer.items()}
    return files
