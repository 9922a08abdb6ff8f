"""The runtime of the CPU's kernels."""

from __future__ import annotations

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
from .kernel_attention import KernelAttention
from .kernels import KernelArithmetic


class CPURuntime(EagerRuntime):
    """Uses the kernels for attention and sampling, too, if the group's arithmetic is theirs.

    Args:
        captured: what takes few tokens through all layers; None: each kernel is called from Python.
    """

    def __init__(
        self, config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup, weights: ModelWeights
    ) -> None:
        super().__init__(config, neuron_config, group, weights)
        # Sums over processes, and activations other than ReLU, are no calls of the kernels.
        alone = group.all_reduce is None and self.program.activation is None
        self.captured: CapturedLayers | None = (
            CapturedLayers(config, group, weights.layers, self.cache)
            if alone and isinstance(group.arithmetic, KernelArithmetic)
            else None
        )

    def _layers(self, step: Step, attention: PackedAttention, hidden_states: list[Tensor] | None) -> Tensor:
        if self.captured is None or len(step.tokens) > MOST_TOKENS or any(step.inner):
            return super()._layers(step, attention, hidden_states)
        return self.captured.run(self._embed(step), step)

    def _attention(self, step: Step) -> PackedAttention:
        arithmetic = self.program.arithmetic
        if not isinstance(arithmetic, KernelArithmetic):
            return super()._attention(step)
        return KernelAttention(step, self.program.scale, arithmetic.compute_dtype, arithmetic)

    def _sample(self, logits: Tensor, suppressed: Tensor, most: int, sampling: SamplingInputs) -> Tensor:
        arithmetic = self.program.arithmetic
        if not isinstance(arithmetic, KernelArithmetic):
            return super()._sample(logits, suppressed, most, sampling)
        best, tokens = arithmetic.best(logits, most, suppressed)
        if most == 1:
            return tokens[:, 0]
        return draw_tokens(best, tokens, tokens[:, 0], sampling.params, sampling.uniforms)
