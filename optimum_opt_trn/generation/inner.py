"""Hidden states and attentions: from packed steps to the tensors that transformers returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..targets import Inner, StepResult
from .inputs import joined, unpack


def inner_outputs(results: Sequence[StepResult], past: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The fields `hidden_states` and `attentions` of a ModelOutput, as far as the steps have them.

    Args:
        results: of one or several steps, which are for consecutive rows.
        past: the columns before, bool `(rows, past width)`.
        mask: the new columns, bool `(rows, width)`.
    """
    outputs = {}
    if results[0].hidden_states is not None:
        layers = zip(*(result.hidden_states or () for result in results), strict=True)
        outputs["hidden_states"] = tuple(unpack(joined(list(parts)), mask) for parts in layers)
    if results[0].attentions is not None:
        runs = zip(*(result.attentions or () for result in results), strict=True)
        outputs["attentions"] = tuple(
            _unpack_weights([w for part in parts for w in part], past, mask) for parts in runs
        )
    return outputs


class InnerRecord:
    """The hidden states and attentions of one call of `generate()`, step by step.

    Args:
        generation_config: says what was asked for.
        mask: the prompts' columns, bool `(rows, width)`.
        start: how many of them were computed before the first step.
    """

    def __init__(self, generation_config: GenerationConfig, mask: Tensor, start: int):
        asked = bool(generation_config.return_dict_in_generate)
        self.inner = Inner(
            asked and bool(generation_config.output_hidden_states), asked and bool(generation_config.output_attentions)
        )
        # The fields of a ModelOutput: for each step, what `inner_outputs` returns.
        self.outputs: dict[str, tuple[tuple[Tensor, ...], ...]] = {
            name: () for name, wanted in self.inner._asdict().items() if wanted
        }
        self._mask, self._start = mask, start

    def add(self, result: StepResult) -> None:
        """Notes what a step returned; each after the first has one column."""
        if not self.outputs:
            return
        parts = inner_outputs([result], self._mask[:, : self._start], self._mask[:, self._start :])
        for name, tensors in parts.items():
            self.outputs[name] += (tensors,)
        self._start = self._mask.shape[1]
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)


def joined_steps(batches: Sequence[tuple[tuple[Tensor, ...], ...]]) -> tuple[tuple[Tensor, ...], ...]:
    """The hidden states or attentions of several batches as one, step by step and layer by layer.

    Where one batch takes fewer steps than another, those of its missing steps are 0.
    """
    longest = max(batches, key=len)

    def of_step(batch: tuple[tuple[Tensor, ...], ...], i: int, layer: int) -> Tensor:
        if i < len(batch):
            return batch[i][layer]
        return torch.zeros(len(batch[0][layer]), *longest[i][layer].shape[1:])

    return tuple(
        tuple(torch.cat([of_step(batch, i, layer) for batch in batches]) for layer in range(len(step)))
        for i, step in enumerate(longest)
    )


def _unpack_weights(weights: list[Tensor], past: Tensor, mask: Tensor) -> Tensor:
    """How the tokens of a packed step attend in one layer, row by row.

    Args:
        weights: for each row with tokens, float32 `(heads, n, used)`.
        past: the columns before, bool `(rows, past width)`.
        mask: the new columns, bool `(rows, width)`.

    Returns:
        float32 `(rows, heads, width, past width + width)`; 0 from and to columns that are no tokens.
    """
    columns = torch.cat([past, mask], dim=1)
    spread = torch.zeros(len(mask), weights[0].shape[0], mask.shape[1], columns.shape[1])
    for row, part in zip(mask.any(-1).nonzero()[:, 0].tolist(), weights, strict=True):
        queries, keys = mask[row].nonzero()[:, 0], columns[row].nonzero()[:, 0]
        spread[row][:, queries[:, None], keys] = part
    return spread
