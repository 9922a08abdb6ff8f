"""The runtime of the CPU's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...buckets import LONG_RUN
from ...model.sampling import SamplingInputs, draw_tokens
from ..base import Step
from ..eager import EagerRuntime
from ..packed_attention import PackedAttention
from .kernels import KernelArithmetic


@dataclass(frozen=True)
class KernelAttention(PackedAttention):
    """Attention by the kernels, except for slots with many tokens: there products of matrices are faster."""

    kernels: KernelArithmetic

    @cached_property
    def parts(self) -> list[tuple[int | None, slice]]:
        """The step's tokens in order, cut: each slot with many tokens, and all that is between, whose slot is None."""
        parts: list[tuple[int | None, slice]] = []
        for slot, tokens in self.step.runs:
            if tokens.stop - tokens.start >= LONG_RUN:
                parts.append((slot, tokens))
            elif parts and parts[-1][0] is None:
                parts[-1] = None, slice(parts[-1][1].start, tokens.stop)
            else:
                parts.append((None, tokens))
        return parts

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `PackedAttention`."""
        step, mixed = self.step, []
        for slot, tokens in self.parts:
            new, places = (query[tokens], key[tokens], value[tokens]), step.positions[tokens]
            if slot is None:
                mixed.append(self.kernels.attend(*new, keys, values, step.slots[tokens], places, self.scale))
            else:
                mixed.append(self.attend_run(*new, keys[slot], values[slot], places))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class CPURuntime(EagerRuntime):
    """Uses the kernels for attention and sampling, too, if the group's arithmetic is theirs."""

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
