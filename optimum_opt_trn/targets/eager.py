"""Runs the rank program on packed tokens, uncompiled: any target's exports, on any CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OPTConfig

from ..checkpoint import ModelWeights
from ..configuration_opt import OPTNeuronConfig
from ..model.attention import allocate_cache
from ..model.parallel import RankGroup
from ..model.program import OPTRankProgram
from ..model.sampling import SamplingInputs, sample_tokens
from .base import Runtime, Step, StepResult
from .packed_attention import PackedAttention


class EagerRuntime(Runtime):
    """Holds all ranks of the group in this process, in lockstep, with memory-mapped weights and the cache."""

    # Arithmetic for some ten rows takes as long as reading the weights: with more, rows that decode wait longer, and
    # the prompt is not done sooner (benchmarks/serving_cpu.py).
    prompt_chunk = 16

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
        if len(sampled) == 0:
            return StepResult(torch.empty(0, dtype=torch.int32), logits)
        # Skip what nobody asked for: empty suppression lists, and all but the best token.
        suppressed = step.sampling.suppressed
        suppressed = suppressed[:, : int((suppressed >= 0).sum(1).max())]
        drawn = bool((step.sampling.params[:, 0] > 1).any())
        most = min(self.neuron_config.max_topk if drawn else 1, logits.shape[1])
        return StepResult(self._sample(sampled, suppressed, most, step.sampling), logits)

    @torch.inference_mode()
    def copy(self, sources: Tensor, length: int) -> None:
        """See `Runtime`."""
        moved = (sources != torch.arange(len(sources))).nonzero().squeeze(1)
        for cache in self.cache:
            for tensor in (*cache.keys, *cache.values):
                tensor[moved, :, :length] = tensor[sources[moved].long(), :, :length]

    @torch.inference_mode()
    def _layers(self, step: Step) -> Tensor:
        """float32 `(t, hidden)`, after the last layer."""
        attention = self._attention(step)
        hidden = self.program.embed(self.weights.embed, step.tokens, step.positions, self.weights.ranks)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = self.program.layer(weights, hidden, attention.over(cache))
        return hidden

    def _attention(self, step: Step) -> PackedAttention:
        return PackedAttention(step, self.program.scale, self.program.arithmetic.compute_dtype)

    def _sample(self, logits: Tensor, suppressed: Tensor, most: int, sampling: SamplingInputs) -> Tensor:
        """float32 `(s, vocabulary)`, of which the `most` best tokens are drawn among → int32 `(s,)`."""
        if most == 1 and not suppressed.shape[1]:
            return logits.argmax(-1).int()  # the first of tokens that tie, as in sample_tokens
        return sample_tokens(logits, sampling.params, sampling.uniforms, suppressed, most)
