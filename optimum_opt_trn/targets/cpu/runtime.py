"""The runtime of the CPU's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.parallel import RankGroup
from ...model.sampling import SamplingInputs, draw_tokens
from ..base import Step
from ..eager import EagerRuntime
from ..packed_attention import PackedAttention
from .captured import MOST_TOKENS, CapturedLayers
from .int8_copy import Int8Copy, Screen
from .kernel_attention import KernelAttention
from .kernels import KernelArithmetic
from .one_thread import fill_rows, take_rows
from .screened_head import ScreenedHead


class CPURuntime(EagerRuntime):
    """Uses the kernels for attention and sampling, too, if the group's arithmetic is theirs.

    Args:
        captured: what takes few tokens through all layers; None: each kernel is called from Python.
        screened_head: what finds best tokens without all logits; None: they are found among the logits.
    """

    def __init__(
        self,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        group: RankGroup,
        weights: ModelWeights,
        screens: Sequence[Screen] = (),
        head_copy: Int8Copy | None = None,
    ) -> None:
        super().__init__(config, neuron_config, group, weights)
        alone = group.all_reduce is None and isinstance(group.arithmetic, KernelArithmetic)
        # Sums over processes, and activations other than ReLU, are no calls of the kernels.
        self.captured: CapturedLayers | None = (
            CapturedLayers(config, group, weights.layers, self.cache, screens)
            if alone and self.program.activation is None
            else None
        )
        self.screened_head: ScreenedHead | None = (
            ScreenedHead(self.program, weights.head, head_copy) if alone and head_copy is not None else None
        )

    def _layers(self, step: Step, attention: PackedAttention, hidden_states: list[Tensor] | None) -> Tensor:
        if self.captured is None or len(step.tokens) > MOST_TOKENS or any(step.inner):
            return super()._layers(step, attention, hidden_states)
        self._embed_into(self.captured.hidden(len(step.tokens)), step)
        return self.captured.run(step)

    def _embed(self, step: Step) -> Tensor:
        return self._embed_into(torch.empty(len(step.tokens), self.program.hidden_size), step)

    def _embed_into(self, hidden: Tensor, step: Step) -> Tensor:
        """`hidden`, float32 `(t, hidden)`, becomes what it is before the first layer."""
        if step.embeddings is not None:
            return hidden.copy_(super()._embed(step))
        embed, weights, ranks = self.program.embed, self.weights.embed, self.weights.ranks
        return fill_rows(hidden, lambda rows: embed(weights, step.tokens[rows], step.positions[rows], ranks))

    def _rows(self, hidden: Tensor, places: Tensor) -> Tensor:
        return take_rows(hidden, places)

    def _attention(self, step: Step) -> PackedAttention:
        arithmetic = self.program.arithmetic
        if not isinstance(arithmetic, KernelArithmetic):
            return super()._attention(step)
        return KernelAttention(step, self.program.scale, arithmetic.compute_dtype, arithmetic)

    def _choose(self, step: Step, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.screened_head is not None and not step.logits and len(step.sampled) and _takes_best(step.sampling):
            last = hidden if len(step.sampled) == len(hidden) else self._rows(hidden, step.sampled)
            if (tokens := self.screened_head.best(last)) is not None:
                return tokens, torch.empty(0, self.program.vocab_size)
        return super()._choose(step, hidden)

    def _sample(self, logits: Tensor, suppressed: Tensor, most: int, sampling: SamplingInputs) -> Tensor:
        arithmetic = self.program.arithmetic
        if not isinstance(arithmetic, KernelArithmetic):
            return super()._sample(logits, suppressed, most, sampling)
        best, tokens = arithmetic.best(logits, most, suppressed)
        if most == 1:
            return tokens[:, 0]
        return draw_tokens(best, tokens, tokens[:, 0], sampling.params, sampling.uniforms)


def _takes_best(sampling: SamplingInputs) -> bool:
    """Whether each row takes the token with the highest logit, of all tokens."""
    return not bool((sampling.params[:, 0] > 1).any() | (sampling.suppressed >= 0).any())
