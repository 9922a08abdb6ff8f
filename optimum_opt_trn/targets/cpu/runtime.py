"""The runtime of the CPU's kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...model.sampling import SamplingInputs, draw_tokens
from ..base import Step
from ..eager import EagerRuntime
from ..packed_attention import PackedAttention
from .kernels import KernelArithmetic


@dataclass(frozen=True)
class KernelAttention(PackedAttention):
    """Attention by the kernels: all tokens of a step in one call."""

    kernels: KernelArithmetic

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `PackedAttention`."""
        return self.kernels.attend(query, key, value, keys, values, self.step.slots, self.step.positions, self.scale)


class CPURuntime(EagerRuntime):
    """Uses the kernels for attention and sampling, too, if the group's arithmetic is theirs."""

    @property
    def prompt_chunk(self) -> int:
        """See `EagerRuntime`; twice as many where bfloat16 factors take half the time."""
        arithmetic = self.program.arithmetic
        doubled = isinstance(arithmetic, KernelArithmetic) and arithmetic.rounds_factors()
        return super().prompt_chunk * (2 if doubled else 1)

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
