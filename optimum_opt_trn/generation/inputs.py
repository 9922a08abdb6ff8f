"""What callers pass to the model: checked, and packed into a step.

OPT counts positions over the attention mask, so that masked tokens can be dropped without changing any result: rows
padded at the left, at the right, or with holes become the same step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..configuration_opt import OPTNeuronConfig
from ..model.sampling import SamplingInputs
from ..targets import LOGITS_ONLY, Inner, Step


IGNORED_LABEL = -100  # of torch.nn.functional.cross_entropy, and of transformers


def as_tensor(values: Any, name: str) -> Tensor:
    """`values`, a tensor or numbers in (nested) lists or arrays, as a tensor.

    Raises:
        TypeError: for text.
        ValueError: for rows of different lengths, and for what are no numbers.
    """
    if isinstance(values, Tensor):
        return values
    text = values[0] if isinstance(values, (list, tuple)) and values else values
    if isinstance(text, (str, bytes)):
        raise TypeError(
            f"{name} is text, {text!r}, and a model takes token ids: pass "
            "tokenizer(text, return_tensors='pt').input_ids, or use optimum_opt_trn.pipeline."
        )
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} is no tensor, and cannot be made one ({error}): rows must be numbers and equally long, as "
            "tokenizer(texts, padding=True, return_tensors='pt') returns them."
        ) from error


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vocab_size: int,
    neuron_config: OPTNeuronConfig,
    past: Tensor | None = None,
) -> Tensor:
    """The mask of the columns of `input_ids`, bool `(rows, width)`.

    Args:
        input_ids: integers `(rows, width)`.
        attention_mask: 1 (or True) for tokens that count; `(rows, past width + width)`, None for all. Tokens of the
            past that it does not count take no room.
        vocab_size: ids go from 0 to one less.
        neuron_config: of the export.
        past: the columns that are in the cache, bool `(rows, past width)`; None for none.

    Raises:
        ValueError: for a row without tokens, or with more than the export has room for, for an id outside of the
            vocabulary, and for shapes that do not fit.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be whole numbers of shape (rows, tokens), not {input_ids.dtype} "
            f"{tuple(input_ids.shape)}: "
            "pass input_ids[None] for one row of tokens, input_ids.long() for whole numbers in another dtype."
        )
    mask = _check_mask("input_ids", input_ids, attention_mask, neuron_config, past)
    check_vocabulary(input_ids, mask, vocab_size)
    return mask


def check_embeddings(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    size: int,
    neuron_config: OPTNeuronConfig,
    past: Tensor | None = None,
) -> Tensor:
    """The mask of the columns of `inputs_embeds`, bool `(rows, width)`.

    Args:
        inputs_embeds: floating point `(rows, width, size)`.
        attention_mask, neuron_config, past: as of `check_inputs`.
        size: the model's `word_embed_proj_dim`.

    Raises:
        ValueError: as `check_inputs`, and for values that are not finite.
    """
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or shape[2] != size or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds must be floating-point numbers of shape (rows, tokens, {size}), as "
            f"model.get_input_embeddings()(input_ids) returns them, not {inputs_embeds.dtype} {shape}."
        )
    mask = _check_mask("inputs_embeds", inputs_embeds, attention_mask, neuron_config, past)
    wrong = mask & ~inputs_embeds.isfinite().all(-1)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"inputs_embeds has values that are not finite (row {row}, place {column}).")
    return mask


def check_vocabulary(input_ids: Tensor, mask: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id outside of the vocabulary; integers and bool `(rows, width)`."""
    outside = mask & ((input_ids < 0) | (input_ids >= vocab_size))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"Token id {int(input_ids[row, column])} (row {row}, place {column}) is outside of the vocabulary: ids go "
            f"from 0 to {vocab_size - 1}. Is it the model's own tokenizer?"
        )


def _check_mask(
    name: str, inputs: Tensor, attention_mask: Tensor | None, neuron_config: OPTNeuronConfig, past: Tensor | None
) -> Tensor:
    """See `check_inputs`. `inputs` are `(rows, width, …)`, and messages call them `name`."""
    rows, columns = inputs.shape[:2]
    past = torch.zeros(rows, 0, dtype=torch.bool) if past is None else past
    width = past.shape[1]
    if attention_mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool)
    else:
        expected = (rows, width + columns)
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but {name} "
                f"{'and past_key_values make' if width else 'has'} {expected}."
            )
        mask = attention_mask[:, width:].bool()
        past = past & attention_mask[:, :width].bool()
    counts = mask.sum(-1)
    if len(mask) == 0 or int(counts.min()) == 0:
        row = 0 if len(mask) == 0 else int(counts.argmin())
        raise ValueError(f"The prompt of row {row} is empty: a prompt has at least one token, for example </s>.")
    longest, limit = int((past.sum(-1) + counts).max()), neuron_config.sequence_length
    if longest > limit:
        raise ValueError(
            f"A row of {longest} tokens does not fit the sequence_length={limit} that the model was exported for: "
            f"shorten it to {limit} or fewer, or export with a larger sequence_length."
        )
    return mask


def check_room(longest: int, added: int, limit: int) -> None:
    """Checks that a sequence and what follows it fit a slot.

    Args:
        longest: tokens of the sequence.
        added: how many follow at most.
        limit: positions of a slot.

    Raises:
        ValueError: if they do not.
    """
    if longest >= limit:
        raise ValueError(
            f"A prompt of {longest} tokens leaves no room in the sequence_length={limit} that the model was "
            f"exported for: shorten it to {limit - 1} or fewer, or export with a larger sequence_length."
        )
    if longest + added > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and {added} new ones do not fit the sequence_length={limit} that the "
            f"model was exported for: choose max_new_tokens of at most {limit - longest}, or export with a larger "
            "sequence_length."
        )


def check_positions(columns: Tensor, mask: Tensor, position_ids: Tensor | None, cache_position: Tensor | None) -> None:
    """Checks the positions that a caller passed, which the masks determine already.

    Args:
        columns: which columns of the past are tokens, bool `(rows, past width)`.
        mask: which new columns are, bool `(rows, width)`.
        position_ids: `(rows, width)`, None if not passed.
        cache_position: `(width,)`, None if not passed.

    Raises:
        ValueError: if they differ.
    """
    start = columns.shape[1]
    if cache_position is not None and cache_position.tolist() != [*range(start, start + mask.shape[1])]:
        raise ValueError(
            f"cache_position={cache_position.tolist()} does not follow the {start} columns of past_key_values: "
            "leave it out."
        )
    if position_ids is not None:
        expected = columns.sum(-1, keepdim=True) + mask.cumsum(-1) - 1
        if bool((mask & (position_ids != expected)).any()):
            raise ValueError(
                "position_ids differ from those that follow from attention_mask, the only ones that an OPT knows: "
                "leave them out."
            )


def check_labels(labels: Tensor, mask: Tensor) -> None:
    """Raises ValueError for labels `(rows, width)` of columns that the bool mask `(rows, width)` gives no logits."""
    if labels.shape != mask.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, but input_ids {tuple(mask.shape)}.")
    counted = labels[:, 1:] != IGNORED_LABEL
    if bool((counted & ~(mask[:, :-1] & mask[:, 1:])).any()):
        raise ValueError(
            f"labels count columns that attention_mask does not, or that follow one that it does not, and nothing "
            f"predicts them: make those {IGNORED_LABEL}, or pad at the right."
        )


def pack(
    input_ids: Tensor,
    mask: Tensor,
    slots: list[int],
    filled: Tensor,
    keep: int,
    sampling: SamplingInputs,
    embeddings: Tensor | None = None,
    inner: Inner = LOGITS_ONLY,
    logits: bool = True,
) -> Step:
    """The step that computes new columns of some rows; masked columns are dropped.

    Args:
        input_ids: integers `(rows, width)`; -1 for tokens that are given by `embeddings`.
        mask: bool `(rows, width)`.
        slots: the slot of each row.
        filled: int64 `(rows,)`, how many positions of each slot are filled.
        keep: of how many of each row's last tokens logits are wanted; 0 for all.
        sampling: of `rows` next tokens; those of rows without tokens are dropped.
        embeddings: floating point `(rows, width, word_embed_proj_dim)`, read where ids are -1.
        inner, logits: as of `Step`.
    """
    owned = torch.tensor(slots)
    if embeddings is not None:
        given = mask & (input_ids < 0)
        embeddings = embeddings[given].detach().float() if bool(given.any()) else None
    if input_ids.shape[1] == 1 and bool(mask.all()):  # as at every decoding step
        wanted = torch.arange(len(slots))
        return Step(input_ids[:, 0].to(torch.int32), owned, filled, wanted, sampling, embeddings, inner, logits)
    counts = mask.sum(-1)
    row, _ = mask.nonzero(as_tuple=True)
    place = (mask.cumsum(-1) - 1)[mask]  # of each token among those of its row
    wanted = torch.arange(len(row)) if keep == 0 else (counts[row] - place <= keep).nonzero().squeeze(1)
    if bool((counts == 0).any()):
        sampling = sampling.of_rows(counts.nonzero().squeeze(1))
    tokens = input_ids[mask].to(torch.int32)
    return Step(tokens, owned[row], filled[row] + place, wanted, sampling, embeddings, inner, logits)


def unpack(packed: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
    """What a packed step has of its tokens, row by row.

    Args:
        packed: float32 `(w, n)`, such as the wanted logits.
        mask, keep: as of `pack`.

    Returns:
        float32 `(rows, width, n)` if `keep` is 0, otherwise `(rows, keep, n)` with each row's last token at the end; 0
        where there is no token.
    """
    if keep:
        counts = mask.sum(-1).clamp(max=keep)
        mask = torch.arange(keep) >= keep - counts[:, None]
    if bool(mask.all()):
        return packed.unflatten(0, mask.shape)
    spread = torch.zeros(*mask.shape, packed.shape[1])
    spread[mask] = packed
    return spread


def joined(parts: list[Tensor]) -> Tensor:
    """The parts, one below the other; a single one is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
