"""Runs the stages in order, with the memory-mapped weights and the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...graphs import smallest_bucket
from ...kv_cache import allocate_cache
from ...modeling_opt import OPTRankProgram, last_token, prompt_positions
from ...parallel import RankGroup
from ...sampling import Selection
from ..base import Runtime
from .stages import Stages


class CPURuntime(Runtime):
    """All ranks in this process, in lockstep."""

    def __init__(
        self,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        group: RankGroup,
        weights: ModelWeights,
        stages: Stages,
    ):
        self.neuron_config = neuron_config
        self.program = OPTRankProgram(config, group)
        self.weights = weights
        self.cache = allocate_cache(config, neuron_config, group)
        self.stages = stages

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        hidden = self._layers(input_ids, prompt_positions(lengths, input_ids.shape[1]), self.stages.context_layer)
        return self._select(last_token(hidden, lengths), selection)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        hidden = self._layers(tokens.unsqueeze(1), positions.unsqueeze(1), self.stages.token_layer)
        return self._select(hidden.squeeze(1), selection)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, positions: Tensor, selection: Selection, keep: int) -> tuple[Tensor, Tensor]:
        hidden = self._layers(tokens, positions, self.stages.context_layer)
        # Compiled code takes the strides for granted that it was exported with.
        chosen, last = self._select(hidden[:, -1].contiguous(), selection)
        before = self.program.logits(self.weights.head, hidden[:, -keep:-1])
        return chosen, torch.cat([before, last.unsqueeze(1)], dim=1)

    @torch.inference_mode()
    def copy(self, sources: Tensor, length: int) -> None:
        moved = (sources != torch.arange(len(sources))).nonzero().squeeze(1)
        for cache in self.cache:
            for tensor in (*cache.keys, *cache.values):
                tensor[moved, :, :length] = tensor[sources[moved].long(), :, :length]

    def _layers(self, tokens: Tensor, positions: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """int32 tokens and positions `(b, n)` → float32 `(b, n, hidden)`, after the last layer."""
        bucket = smallest_bucket(self.neuron_config.cache_buckets, int(positions.max()) + 1)
        hidden = self.program.embed(self.weights.embed, tokens, positions)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = layer(weights, hidden, *cache.first(bucket), positions)
        return hidden

    def _select(self, hidden: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        tokens, logits = self.stages.head(
            self.weights.head, hidden, selection.params, selection.uniforms, selection.suppressed
        )
        return tokens, logits
