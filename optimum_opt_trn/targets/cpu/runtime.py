"""Runs the stages in order, with the memory-mapped weights and the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...graphs import smallest_bucket
from ...kv_cache import allocate_cache
from ...modeling_opt import OPTRankProgram, last_token
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
        return self._select(last_token(self._encode(input_ids), lengths), selection)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        bucket = smallest_bucket(self.neuron_config.cache_buckets, int(positions.max()) + 1)
        positions = positions.unsqueeze(1)
        hidden = self.program.embed(self.weights.embed, tokens.unsqueeze(1), positions)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = self.stages.token_layer(weights, hidden, *cache.first(bucket), positions)
        return self._select(hidden.squeeze(1), selection)

    @torch.inference_mode()
    def prompt_logits(self, input_ids: Tensor) -> Tensor:
        return self.program.logits(self.weights.head, self._encode(input_ids))

    def _encode(self, input_ids: Tensor) -> Tensor:
        rows, length = input_ids.shape
        positions = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
        hidden = self.program.embed(self.weights.embed, input_ids, positions)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = self.stages.context_layer(weights, hidden, *cache.first(length), positions)
        return hidden

    def _select(self, hidden: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        tokens, logits = self.stages.head(
            self.weights.head, hidden, selection.params, selection.uniforms, selection.suppressed
        )
        return tokens, logits
