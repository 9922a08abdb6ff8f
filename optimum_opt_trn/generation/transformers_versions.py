"""What differs between the transformers that this package supports, 4.57 and 5; no other module knows a version.

| what | 4.57 | 5 |
|---|---|---|
| name of the cache, as an argument and in outputs | `past_key_values` | from 5.24 `cache` |
| `Cache.crop(n)`, n not negative | n columns stay | from 5.18: 0 columns go; above 0 is an error |
| options that were not given | have defaults in a GenerationConfig | are None, and get defaults in `generate()` |
| a mask of only ones | is passed on | from 5.18 it is dropped, and `generation_config._mask_length` has its width |
| position ids | made for each call of the model | also passed to the `generate()` of an assistant |
| assisted generation | needs no cache at first | needs one; passes all tokens with a given one |
| what `generate()` calls besides | | `is_remote_code` and `_optimize_model_for_decode`, which need a PreTrainedModel |
| `GenerationOutput` | | declares `lifespan` and `timestamps` |
| a repetition penalty | of all of a row | notes each row's padding, which it ignores |
| default options of a pipeline | in `pipeline.generation_config` | merged at each call |
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, TextGenerationPipeline
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.modeling_outputs import CausalLMOutputWithPast


# The name of the cache, as an argument of generate() and forward(), and in their outputs.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"

# The arguments of generate() after generation_config, in their order; all others are options or go to forward().
ARGUMENTS = tuple(
    name
    for name in inspect.signature(GenerationMixin.generate).parameters
    if name not in ("self", "inputs", "generation_config", "kwargs")
)

# New tokens where no length was given.
_DEFAULT_LENGTH = GenerationConfig().max_length or GenerationConfig._get_default_generation_params()["max_length"]

_LENGTHS = {"max_new_tokens", "max_length"}
_BY_DEFAULT = "_length_by_default"  # an attribute of a GenerationConfig

_OUTPUT_FIELDS = {field.name for field in fields(GenerationOutput)}

_CROP_REMOVES = "tokens_to_remove" in inspect.signature(Cache.crop).parameters


def settle_arguments(generation_config: GenerationConfig | None, arguments: dict[str, Any]) -> None:
    """Gives the cache in the arguments of `generate()` its name, and drops the position ids of an assistant.

    Position ids follow from the mask.

    Raises:
        ValueError: if the cache is given under both names.
    """
    if generation_config is not None and generation_config.is_assistant:
        arguments.pop("position_ids", None)
    given = [name for name in ("past_key_values", "cache") if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError("past_key_values and cache are two names of the same argument: give one.")
    for name in given:
        arguments[CACHE] = arguments.pop(name)


def prepare_options(
    model: GenerationMixin, generation_config: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The options among the arguments of `generate()`, with their defaults, and what goes to `forward()`."""
    # Only transformers 4.57 has use_model_defaults.
    options = {n: v for n, v in arguments.items() if n not in ARGUMENTS or n == "use_model_defaults"}
    prepared: tuple[GenerationConfig, dict[str, Any]]
    prepared = model._prepare_generation_config(generation_config, **options)
    return prepared


def length_is_default(generation_config: GenerationConfig, has_default_max_length: bool) -> bool:
    """Whether no length was given; the arguments are those of `_prepare_generated_length`."""
    by_default = has_default_max_length and generation_config.max_new_tokens is None
    return by_default and generation_config.max_length == _DEFAULT_LENGTH


def restore_mask(generation_config: GenerationConfig, model_kwargs: dict[str, Any], batch_size: int) -> None:
    """Adds the mask, int64 `(rows, width)`, if transformers dropped it; removes position ids, which follow from it."""
    model_kwargs.pop("position_ids", None)
    if model_kwargs.get("attention_mask") is None:
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["attention_mask"] = torch.ones(rows, generation_config._mask_length, dtype=torch.long)


def columns_after_crop(width: int, crop: int) -> int:
    """How many of `width` columns stay after `Cache.crop(crop)`.

    Raises:
        ValueError: for a number above 0 if transformers takes the number of columns to remove, as a negative one.
    """
    if not _CROP_REMOVES and crop >= 0:
        return min(crop, width)
    if crop > 0:
        raise ValueError(f"crop({crop}): give the number of columns to remove, as a negative number.")
    return max(width + crop, 0)


def generation_output(**values: Any) -> GenerationOutput:
    """What transformers' continuous batching returns of a request, with the fields that transformers 5 added."""
    output = GenerationOutput(**{name: value for name, value in values.items() if name in _OUTPUT_FIELDS})
    for name in values.keys() - _OUTPUT_FIELDS:
        setattr(output, name, values[name])
    return output


def lengths_by_default(
    model: GenerationMixin, given: GenerationConfig | None, options: Mapping[str, Any], prepared: GenerationConfig
) -> tuple[bool, bool]:
    """Whether neither caller nor model chose a `max_length`, a `min_length`, as `generate()` decides it.

    Args:
        given: the GenerationConfig that the caller passed.
        options: by name, what the caller passed besides.
        prepared: all options.
    """

    def by_default(name: str) -> bool:
        if options.get(name) is not None:
            return False
        if GenerationConfig().max_length is not None:  # transformers 4.57
            return getattr(prepared, name) is not None
        return all(getattr(config, name, None) is None for config in (given, model.generation_config))

    return by_default("max_length"), by_default("min_length")


def default_new_tokens(pipeline: TextGenerationPipeline) -> int | None:
    """The max_new_tokens of a call of `pipeline` that gives no length; None if the model has a max_length."""
    options: GenerationConfig | None = getattr(pipeline, "generation_config", None)
    if options is None:  # transformers 5
        options = pipeline.model.generation_config
        if options.max_new_tokens is None and options.max_length is None:
            options = pipeline._default_generation_config
    new_tokens: int | None = options.max_new_tokens
    return new_tokens


def mark_default_length(prepared: GenerationConfig, given: GenerationConfig | None, kwargs: Mapping[str, Any]) -> None:
    """Notes in `prepared` that its `max_new_tokens` is the default of transformers' pipelines, which asks for nothing.

    Only transformers 4.57 lets a model know: its pipelines prepare their default options with it.

    Args:
        prepared: the options, for a pipeline that is being made or for a call.
        given: the options that `prepared` was made from.
        kwargs: the options that a user gave.
    """
    if given is None or _LENGTHS & kwargs.keys():
        return
    if given is TextGenerationPipeline._default_generation_config:
        setattr(prepared, _BY_DEFAULT, True)


def is_default_length(given: GenerationConfig | None, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has no other length than the default of transformers' pipelines. Arguments: those of the call."""
    by_default = getattr(given, _BY_DEFAULT, False) and given is not None and given.max_new_tokens is not None
    return by_default and not _LENGTHS & kwargs.keys()


class VersionedGenerationMixin(GenerationMixin):
    """transformers' GenerationMixin, for a model that is not a `PreTrainedModel`."""

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        return nullcontext()  # transformers' own is about experts, which an OPT does not have

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache, mask = inputs.get(CACHE), inputs.get("attention_mask")
        if cache is not None and mask is not None and inputs["input_ids"] is not None:
            inputs["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() - mask.shape[1] :]
        return inputs


def processors_of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors that transformers prepared for several rows, for one of them.

    transformers 5 notes for each row how much padding a repetition penalty ignores.
    """
    own = LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[row : row + 1]
        own.append(processor)
    return own
