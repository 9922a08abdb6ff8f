"""What users pass to `generate()`, before transformers sees it: prompts in any form, and options that mean something.

transformers' own messages for these come late, or name neither the value nor the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..configuration_opt import reject_unknown
from .inputs import as_tensor


# Arguments with tokens, or a mask of them.
_OF_TOKENS = (
    *("input_ids", "inputs_embeds", "attention_mask"),
    *("negative_prompt_ids", "negative_prompt_attention_mask"),
)
# Counts that are at least 1.
_COUNTS = ("num_beams", "num_return_sequences", "prefill_chunk_size")


def unpack_prompts(inputs: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The prompts and the other arguments of a call, lists and arrays among them as tensors.

    Args:
        inputs: tokens as a tensor, lists or an array, `(rows, tokens)`; what a tokenizer returned; or None.
        kwargs: the other arguments.

    Raises:
        TypeError: for text, and for what is given twice.
        ValueError: for rows of different lengths.
    """
    if isinstance(inputs, Mapping):  # as a tokenizer returns it
        if twice := sorted(inputs.keys() & kwargs.keys()):
            raise TypeError(f"generate() got {twice[0]} twice: in the first argument, and by name.")
        inputs, kwargs = None, {**kwargs, **inputs}
    for name in _OF_TOKENS:
        if kwargs.get(name) is not None:
            kwargs[name] = as_tensor(kwargs[name], name)
    return None if inputs is None else as_tensor(inputs, "input_ids"), kwargs


def check_options(asked: GenerationConfig, others: Iterable[str], arguments: Collection[str]) -> None:
    """Checks what transformers would refuse late or not at all.

    Args:
        asked: the options, prepared.
        others: names of arguments that are no options of it.
        arguments: names that mean something, beside those of options.

    Raises:
        TypeError: for a name that means nothing, naming the nearest that does.
        ValueError: for a count below 1, and for an empty list of bad words.
    """
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    reject_unknown(others, options.union(arguments), "generate()")
    for name in _COUNTS:
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be a positive whole number.")
    if asked.bad_words_ids is not None and not all(asked.bad_words_ids):
        raise ValueError(
            f"bad_words_ids={asked.bad_words_ids!r} has a word without tokens: each word is a list of at least one "
            "token id. Leave it out, or leave bad_words_ids out."
        )


def ids_with_embeddings(
    inputs_embeds: Tensor, input_ids: Tensor | None, asked: GenerationConfig, arguments: Mapping[str, Any]
) -> Tensor:
    """The ids that go with prompts given as embeddings, int64 `(rows, n)`; n is 0 if there are none.

    As in transformers, they are not computed with: processors see them, and the result begins with them.

    Raises:
        ValueError: for another number of rows; for guidance without a prompt to guide by.
        NotImplementedError: for candidates, which are looked for in ids.
    """
    drafts = {
        "assistant_model": arguments.get("assistant_model"),
        "prompt_lookup_num_tokens": asked.prompt_lookup_num_tokens,
    }
    for name, value in drafts.items():
        if value is not None:
            raise NotImplementedError(
                f"generate(inputs_embeds=…, {name}=…) is not served: candidates follow from the ids of a prompt. "
                f"Leave {name} out."
            )
    if input_ids is None:
        input_ids = torch.ones(len(inputs_embeds), 0, dtype=torch.long)
    if input_ids.ndim != 2 or len(input_ids) != len(inputs_embeds):
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, and inputs_embeds {len(inputs_embeds)} rows: pass ids for "
            "each of its rows, which the result then begins with, or leave input_ids out."
        )
    guided = asked.guidance_scale not in (None, 1)
    if guided and not input_ids.shape[1] and arguments.get("negative_prompt_ids") is None:
        raise ValueError(
            f"guidance_scale={asked.guidance_scale} with inputs_embeds needs ids for the other prompt: pass "
            "negative_prompt_ids."
        )
    return input_ids


def inferred_mask(input_ids: Tensor, asked: GenerationConfig) -> Tensor | None:
    """The mask that transformers will assume where none is given: padding does not count, unless it also ends.

    Raises:
        ValueError: for a row that is padding only.
    """
    pad, ends = asked.pad_token_id, asked.eos_token_id
    if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
        return None
    mask = input_ids != pad
    if mask.ndim == 2 and mask.numel() and not input_ids.is_floating_point() and not bool(mask.any(-1).all()):
        raise ValueError(
            f"Every token of row {int(mask.any(-1).int().argmin())} is the pad token (pad_token_id={pad}), which does "
            "not count where no attention_mask is passed: pass attention_mask=torch.ones_like(input_ids) if these "
            "tokens are the prompt."
        )
    return mask


def keep_in_room(generator: Any, columns: int, assistant_columns: int | None) -> Any:
    """Cuts the candidates of assisted generation and prompt lookup to the room that the export has left.

    transformers ends such a call after the step in which candidates went beyond the length; a cache of fixed size has
    no room for that step.

    Args:
        generator: transformers' `CandidateGenerator`; it is changed.
        columns: columns of `input_ids` that the model has room for.
        assistant_columns: the same of an assistant with the same tokenizer; None where there is none of ours.

    Returns:
        The generator.
    """
    get: Callable[..., tuple[Tensor, Tensor | None]] = generator.get_candidates

    def get_candidates(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        width = input_ids.shape[1]
        if assistant_columns is None:
            candidates, logits = get(input_ids, **kwargs)
        elif width >= assistant_columns:
            return input_ids, None
        else:
            asked = generator.num_assistant_tokens
            generator.num_assistant_tokens = min(asked, assistant_columns - width)
            try:
                candidates, logits = get(input_ids, **kwargs)
            finally:
                generator.num_assistant_tokens = asked
        return candidates[:, :columns], None if logits is None else logits[:, : max(columns - width, 0)]

    generator.get_candidates = get_candidates
    return generator
