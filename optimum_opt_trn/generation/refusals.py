"""What no export serves of `generate()`, and why. What only some targets do not serve: `Runtime.unserved`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig


NO_HEAD_MASK = "the heads of a layer are computed together"

# Options of GenerationConfig that no export serves, and why. The others do what they do in transformers.
REFUSED_OPTIONS = {
    "cache_implementation": "the cache is on the device, of a fixed size; 'dynamic' and 'dynamic_full' are accepted",
    "cache_config": "the cache is on the device, of a fixed size",
    "max_cache_len": "the cache is on the device, of a fixed size",
    "return_legacy_cache": "keys and values are on the device",
    "compile_config": "graphs were compiled by the export",
    "assistant_early_exit": "a compiled layer cannot be left out: pass an assistant_model",
    "use_mtp": "an OPT has no layers that predict several tokens: pass an assistant_model",
    "speculation_type": "assistants of that kind read the model's hidden states: pass an assistant_model",
    "continuous_batching_config": "it is for transformers' own models",
    "penalty_alpha": "contrastive search is code from the hub in transformers, made for its own models",
    "dola_layers": "DoLa is code from the hub in transformers, made for its own models",
    "diversity_penalty": "group beam search is code from the hub in transformers, made for its own models",
    "num_beam_groups": "group beam search is code from the hub in transformers, made for its own models",
    "constraints": "constrained beam search is code from the hub in transformers, made for its own models",
    "force_words_ids": "constrained beam search is code from the hub in transformers, made for its own models",
}
# Values of them that change nothing.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "cache_implementation": ("dynamic", "dynamic_full"),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
}
# Arguments of generate() that no export serves, and why.
REFUSED_ARGUMENTS = {
    "synced_gpus": "there are no GPUs to keep in step",
    "head_mask": NO_HEAD_MASK,
    "encoder_outputs": "an OPT has no encoder",
    "decoder_input_ids": "an OPT has no encoder",
    "position_ids": "they follow from attention_mask",
    "cache_position": "it follows from past_key_values",
    "labels": "call the model itself for a loss",
    "seq_ids": "generate() counts slots itself",
    "sampling_params": "they follow from the options",
}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for an argument of `generate()` that no export serves."""
    for name, reason in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise NotImplementedError(f"generate({name}=…) is not served: {reason}.")


def refuse_options(asked: GenerationConfig) -> None:
    """Raises NotImplementedError for an option that no export serves."""
    for name, reason in REFUSED_OPTIONS.items():
        value = getattr(asked, name, None)
        if value and value not in _HARMLESS.get(name, ()):
            raise NotImplementedError(f"generate() was asked for {name}={value!r}, which is not served: {reason}.")
