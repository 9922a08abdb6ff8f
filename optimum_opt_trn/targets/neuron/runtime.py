"""Calls the compiled graphs: tokens in, tokens and logits out; weights and cache stay on the cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...buckets import smallest_bucket
from ...configuration_opt import OPTNeuronConfig
from ...model.sampling import Selection
from ..base import Runtime
from .rank_module import NO_WINDOW, extension_length, selection_inputs


class NeuronRuntime(Runtime):
    """A model that NxD has loaded; each method is one call of it, `extend` several if it is long.

    Args:
        neuron_config: what the model was exported for.
        model: takes the six arguments of a graph (see `rank_module`) and returns tokens and logits.
    """

    def __init__(self, neuron_config: OPTNeuronConfig, model: Callable[..., tuple[Tensor, Tensor]]):
        self.neuron_config = neuron_config
        self.model = model
        self.windows = {length: torch.zeros(length, dtype=torch.int32) for length in neuron_config.cache_buckets}

    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        return self._call(input_ids, lengths, NO_WINDOW, selection)

    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        bucket = smallest_bucket(self.neuron_config.cache_buckets, int(positions.max()) + 1)
        return self._call(tokens, positions, self.windows[bucket], selection)

    def extend(self, tokens: Tensor, positions: Tensor, selection: Selection, keep: int) -> tuple[Tensor, Tensor]:
        size, n = extension_length(self.neuron_config), tokens.shape[1]
        kept = []
        for start in range(0, n, size):
            # The last piece repeats the last token at its place, which writes there what is there.
            columns = torch.arange(start, start + size).clamp(max=n - 1)
            chosen, logits = self._call(tokens[:, columns], positions[:, columns], NO_WINDOW, selection)
            if start + size > n - keep:
                kept.append(logits[:, : n - start])
        return chosen, torch.cat(kept, dim=1)[:, -keep:]

    def copy(self, sources: Tensor, length: int) -> None:
        if self.neuron_config.batch_size > 1:
            greedy = Selection.greedy(self.neuron_config.batch_size)
            self._call(sources, torch.tensor([length]), NO_WINDOW, greedy)

    def _call(self, tokens: Tensor, positions: Tensor, window: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        tokens, positions = tokens.to(torch.int32), positions.to(torch.int32)
        return self.model(tokens, positions, window, *selection_inputs(selection))
