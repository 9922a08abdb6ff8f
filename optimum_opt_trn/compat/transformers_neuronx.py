"""OPT of transformers-neuronx under its old names: an old script needs only other import lines.

    from optimum_opt_trn.compat.transformers_neuronx import OPTForSampling, save_pretrained_split

`docs/migration.md` has the counterpart of each old option. This module is a thin layer over
`optimum_opt_trn.NeuronOPTForCausalLM`, which new scripts use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..checkpoint import save_pretrained_split as _save_split
from ..dtypes import normalize_dtype
from .opt_for_sampling import OPTForSampling, without_generation_config
from .options import GenerationConfig, NeuronConfig, QuantizationConfig


__all__ = [
    "GenerationConfig",
    "HuggingFaceGenerationModelAdapter",
    "NeuronConfig",
    "OPTForSampling",
    "QuantizationConfig",
    "amp_callback",
    "save_pretrained_split",
]

_GONE = {
    "NeuronAutoModelForCausalLM": "use optimum.neuron.NeuronModelForCausalLM after `import optimum_opt_trn`.",
    "OPTForGreedySearch": "use OPTForSampling with NeuronConfig(on_device_generation=GenerationConfig()).",
    "ContinuousBatchingConfig": "a batch starts together here: leave continuous batching out.",
    "SparseAttnConfig": "every token attends to all before it, as OPT was trained: leave sparse attention out.",
}


def __getattr__(name: str) -> Any:
    if name in _GONE:
        raise ImportError(f"{name} of transformers-neuronx has no counterpart here: {_GONE[name]}")
    if name.endswith("ForSampling"):
        raise ImportError(f"{name}: this library has OPT only; for other models use optimum-neuron.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def amp_callback(model: transformers.OPTForCausalLM, dtype: torch.dtype) -> None:
    """Casts attention, MLP and lm_head of `model` in place, as the old library's demo did; layernorms stay."""
    for layer in model.model.decoder.layers:
        for part in (layer.self_attn, layer.fc1, layer.fc2):
            part.to(dtype)
    model.lm_head.to(dtype)


def save_pretrained_split(model: transformers.OPTForCausalLM, save_directory: str | os.PathLike[str]) -> Path:
    """Writes `model` to `save_directory` as a split checkpoint: one safetensors file a layer.

    `amp` is the dtype to which the caller has cast attention and MLP. `model` is not changed.

    Returns:
        The directory.

    Raises:
        TypeError: if `model` is not an OPT.
        ValueError: if attention and MLP weights do not all have the same dtype.
    """
    if not isinstance(model, transformers.OPTForCausalLM):
        raise TypeError(f"save_pretrained_split takes an OPTForCausalLM, not a {type(model).__name__}.")
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.model.decoder.layers.named_parameters():
        if any(part in name for part in (".self_attn.", ".fc1.", ".fc2.")):
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) != 1:
        found = ", ".join(f"{name}: {dtype}" for dtype, name in dtypes.items())
        raise ValueError(f"Attention and MLP are cast to different dtypes ({found}): cast all of them to one.")
    return _save_split(model, save_directory, amp=normalize_dtype(next(iter(dtypes))))


class HuggingFaceGenerationModelAdapter:
    """`generate()` of transformers for an `OPTForSampling`. A `NeuronOPTForCausalLM` has its own.

    Args:
        config: the model's configuration.
        model: the model, after `to_neuron`.
    """

    def __init__(self, config: transformers.OPTConfig, model: OPTForSampling):
        self.config = config
        self.model = model
        self.generation_config = transformers.GenerationConfig.from_model_config(config)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: transformers.GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `NeuronOPTForCausalLM.generate`, with the defaults of `config`, as in the old library."""
        model = self.model._loaded()
        with without_generation_config(model):
            return model.generate(inputs, generation_config or self.generation_config, **kwargs)

    def reset_generation(self) -> None:
        """Does nothing: each `generate` starts with an empty cache."""

    def eval(self) -> HuggingFaceGenerationModelAdapter:
        """Does nothing: there is no other mode."""
        return self
