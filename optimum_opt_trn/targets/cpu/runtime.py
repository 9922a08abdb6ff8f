"""Runs the rank program on packed tokens, with memory-mapped weights and the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.attention import allocate_cache
from ...model.parallel import RankGroup
from ...model.program import OPTRankProgram
from ...model.sampling import SamplingInputs, draw_tokens, sample_tokens
from ..base import Runtime, Step, StepResult
from .kernels import KernelArithmetic
from .packed_attention import PackedAttention


class CPURuntime(Runtime):
    """Holds all ranks of the group in this process, in lockstep."""

    def __init__(
        self, config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup, weights: ModelWeights
    ) -> None:
        self.neuron_config = neuron_config
        self.program = OPTRankProgram(config, group)
        self.weights = weights
        self.cache = allocate_cache(config, neuron_config, group)

    @torch.no_grad()
    def step(self, step: Step) -> StepResult:
        """See `Runtime`."""
        hidden = self._layers(step)
        if len(step.wanted) < len(hidden):
            hidden = hidden[step.wanted]
        # Not in inference mode: callers may change logits in place.
        logits = self.program.logits(self.weights.head, hidden)
        sampled = logits if len(step.sampled) == len(logits) else logits[step.sampled]
        return StepResult(self._sample(sampled, step.sampling), logits)

    @torch.inference_mode()
    def _layers(self, step: Step) -> Tensor:
        """float32 `(t, hidden)`, after the last layer."""
        program = self.program
        attention = PackedAttention(step, program.scale, program.arithmetic)
        hidden = program.embed(self.weights.embed, step.tokens, step.positions, self.weights.ranks)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = program.layer(weights, hidden, attention.over(cache))
        return hidden

    @torch.inference_mode()
    def copy(self, sources: Tensor, length: int) -> None:
        """See `Runtime`."""
        moved = (sources != torch.arange(len(sources))).nonzero().squeeze(1)
        for cache in self.cache:
            for tensor in (*cache.keys, *cache.values):
                tensor[moved, :, :length] = tensor[sources[moved].long(), :, :length]

    def _sample(self, logits: Tensor, sampling: SamplingInputs) -> Tensor:
        """float32 `(s, vocabulary)` → int32 `(s,)`."""
        if len(logits) == 0:
            return torch.empty(0, dtype=torch.int32)
        # Skip what nobody asked for: empty suppression lists, and all but the best token.
        suppressed = sampling.suppressed[:, : int((sampling.suppressed >= 0).sum(1).max())]
        drawn = bool((sampling.params[:, 0] > 1).any())
        arithmetic = self.program.arithmetic
        if isinstance(arithmetic, KernelArithmetic):
            most = min(self.neuron_config.max_topk if drawn else 1, logits.shape[1])
            best, tokens = arithmetic.best(logits, most, suppressed)
            if not drawn:
                return tokens[:, 0]
            return draw_tokens(best, tokens, tokens[:, 0], sampling.params, sampling.uniforms)
        if drawn:
            most = self.neuron_config.max_topk
        elif suppressed.shape[1]:
            most = 1
        else:
            return logits.argmax(-1).int()  # the first of tokens that tie, as in sample_tokens
        return sample_tokens(logits, sampling.params, sampling.uniforms, suppressed, most)
