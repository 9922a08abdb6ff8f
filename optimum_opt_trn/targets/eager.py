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
from .packed_attention import PackedAttention, RecordedAttention


class EagerRuntime(Runtime):
    """Holds all ranks of the group in this process, in lockstep, with memory-mapped weights and the cache."""

    def __init__(
        self, config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup, weights: ModelWeights
    ) -> None:
        self.neuron_config = neuron_config
        self.program = OPTRankProgram(config, group)
        self.weights = weights
        self.cache = allocate_cache(config, neuron_config, group)

    @property
    def prompt_chunk(self) -> int:
        """See `Runtime`. With more tokens, rows that decode wait too long; with fewer, weights are read too often.

        With 8 rows that decode it is a step of 48 tokens, whose calls the CPU's kernels still replay.
        """
        return 40

    @torch.no_grad()
    def step(self, step: Step) -> StepResult:
        """See `Runtime`."""
        hidden_states: list[Tensor] | None = [] if step.inner.hidden_states else None
        attention, recorded = self._attention(step), None
        if step.inner.attentions:
            attention = recorded = RecordedAttention(step, attention.scale, attention.compute_dtype)
        # What callers get is not of inference mode, in which it could neither be changed nor have gradients.
        with torch.inference_mode(not any(step.inner)):
            hidden = self._layers(step, attention, hidden_states)
        attentions = None if recorded is None else recorded.of_all_heads(self.program.group)
        if len(step.wanted) < len(hidden):
            hidden = self._rows(hidden, step.wanted)
        tokens, logits = self._choose(step, hidden)
        return StepResult(tokens, logits, hidden_states, attentions)

    def _choose(self, step: Step, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """float32 `(w, hidden)` of the wanted tokens → next tokens and logits, as of `StepResult`."""
        logits = self.program.logits(self.weights.head, hidden)
        sampled = logits if len(step.sampled) == len(logits) else logits[step.sampled]
        if len(sampled) == 0:
            return torch.empty(0, dtype=torch.int32), logits
        # Skip what nobody asked for: empty suppression lists, and all but the best token.
        suppressed = step.sampling.suppressed
        suppressed = suppressed[:, : int((suppressed >= 0).sum(1).max())]
        drawn = bool((step.sampling.params[:, 0] > 1).any())
        most = min(self.neuron_config.max_topk if drawn else 1, logits.shape[1])
        return self._sample(sampled, suppressed, most, step.sampling), logits

    @torch.inference_mode()
    def copy(self, sources: Tensor, length: int) -> None:
        """See `Runtime`."""
        moved = (sources != torch.arange(len(sources))).nonzero().squeeze(1)
        for cache in self.cache:
            for tensor in (*cache.keys, *cache.values):
                tensor[moved, :, :length] = tensor[sources[moved].long(), :, :length]

    def _layers(self, step: Step, attention: PackedAttention, hidden_states: list[Tensor] | None) -> Tensor:
        """float32 `(t, hidden)`, after the last layer; adds those of `StepResult` to `hidden_states`."""
        hidden = self._embed(step)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            if hidden_states is not None:
                hidden_states.append(hidden)
            hidden = self.program.layer(weights, hidden, attention.over(cache))
        if hidden_states is not None:
            hidden_states.append(self.program.last_hidden_state(self.weights.head, hidden))
        return hidden

    def _embed(self, step: Step) -> Tensor:
        """float32 `(t, hidden)`, before the first layer."""
        weights, ranks = self.weights.embed, self.weights.ranks
        if step.embeddings is None:
            return self.program.embed(weights, step.tokens, step.positions, ranks)
        given = step.tokens < 0
        words = self.program.group.embedding(step.tokens.clamp(min=0), weights["embed_tokens.weight"], ranks)
        words[given] = step.embeddings
        return self.program.place(weights, words, step.positions)

    def _rows(self, hidden: Tensor, places: Tensor) -> Tensor:
        """float32 `(t, hidden)`, int64 `(w,)` → float32 `(w, hidden)`, of the tokens at these places."""
        return hidden[places]

    def _attention(self, step: Step) -> PackedAttention:
        return PackedAttention(step, self.program.scale, self.program.arithmetic.compute_dtype)

    def _sample(self, logits: Tensor, suppressed: Tensor, most: int, sampling: SamplingInputs) -> Tensor:
        """float32 `(s, vocabulary)`, of which the `most` best tokens are drawn among → int32 `(s,)`."""
        if most == 1 and not suppressed.shape[1]:
            return logits.argmax(-1).int()  # the first of tokens that tie, as in sample_tokens
        return sample_tokens(logits, sampling.params, sampling.uniforms, suppressed, most)
