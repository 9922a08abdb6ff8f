"""What an OPT checkpoint consists of: names, shapes and dtypes of its tensors, and the files of the split format.

`amp` in this module is the dtype that attention, MLP, embedding and head are stored in, a name in `dtypes.DTYPES`.
With `weight_dtype="int8"` the matrices of attention and MLP are int8, and have scales (quantization.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

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


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, broken, or not of the model that its config.json describes."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint: its full shape, and its dtype, a name in `dtypes.DTYPES`."""

    shape: tuple[int, ...]
    dtype: str

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


def layer_specs(config: ModelShape, amp: str, weight_dtype: str | None = None) -> dict[str, TensorSpec]:
    """The tensors of one decoder layer, by their names within the layer."""
    hidden, ffn = config.hidden_size, config.ffn_dim
    specs = {}
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    for name, shape in {**linears, "fc1": (ffn, hidden), "fc2": (hidden, ffn)}.items():
        specs[f"{name}.weight"] = TensorSpec(shape, weight_dtype or amp)
        if weight_dtype == "int8":
            specs[f"{name}.weight_scale"] = TensorSpec((shape[0], 1), "f32")
        if config.enable_bias:
            specs[f"{name}.bias"] = TensorSpec(shape[:1], amp)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        specs.update(_layer_norm(name, config))
    return specs


def outer_specs(config: ModelShape, amp: str) -> dict[str, TensorSpec]:
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
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = TensorSpec((words, dim), amp)
    return specs


def _layer_norm(name: str, config: ModelShape) -> dict[str, TensorSpec]:
    if not config.layer_norm_elementwise_affine:
        return {}
    return {f"{name}.{part}": TensorSpec((config.hidden_size,), "f32") for part in ("weight", "bias")}


def checkpoint_files(config: ModelShape, amp: str, weight_dtype: str | None = None) -> FileSpecs:
    """Every file of the split format, and its tensors by their full names, in the order of writing."""
    files = {OUTER_FILE: outer_specs(config, amp)}
    layer = layer_specs(config, amp, weight_dtype)
    for index in range(config.num_hidden_layers):
        files[layer_file(index)] = {layer_prefix(index) + name: spec for name, spec in layer.items()}
    return files
