"""The calls of the kernels that lead through all layers: captured once, replayed as one call.

GPUs have CUDA graphs for the same reason. Between two kernels Python takes some 25 µs, and a layer has five of them:
that is a tenth of a step of OPT-1.3B, and more of smaller models. The calls for a number of tokens stay the same as
long as their inputs and outputs are where they were.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig

from ...model.arithmetic import LayerNorm
from ...model.attention import LayerCache
from ...model.parallel import RankGroup, Weights
from ...model.program import OPTRankProgram
from ..base import Step
from .int8_copy import Screen
from .kernel_attention import KernelAttention
from .kernels import CALLS, MOST_NORMED_ROWS, KernelArithmetic, replay


# With more, Python's share is small, and layernorms are calls of their own.
MOST_TOKENS = MOST_NORMED_ROWS


class _Buffers:
    """Where layers write their results, up to MOST_TOKENS rows of them.

    Every other layer uses the same, whatever the number of tokens is, since a runtime computes one step at a time. The
    layers between them read what they wrote.
    """

    def __init__(self) -> None:
        self.all: dict[tuple[int, int, int], Tensor] = {}
        self.begin(0)

    def begin(self, layer: int) -> None:
        """From here on, results are those of this layer."""
        self.layer, self._half, self._taken = layer, layer % 2, 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """float32, of this shape, for the next result of the layer."""
        key = (self._half, self._taken, shape[-1])
        if key not in self.all:
            self.all[key] = torch.empty(MOST_TOKENS * shape[-1])
        self._taken += 1
        return self.all[key][: math.prod(shape)].view(shape)


@dataclass(frozen=True)
class _CapturingArithmetic(KernelArithmetic):
    """Computes as usual, but to buffers that stay; and notes the calls.

    Args:
        screens: of each layer's fc1, the only products that a ReLU follows; none if there are no copies.
        words: the calls, as `replay` takes them.
    """

    buffers: _Buffers = field(default_factory=_Buffers)
    screens: Sequence[Screen] = ()
    words: array[int] = field(default_factory=lambda: array("q"))

    def linears(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor] | None = None,
        relu: bool = False,
        norm: LayerNorm | None = None,
        scales: list[Tensor] | None = None,
    ) -> list[Tensor]:
        if relu and self.screens:
            return self.screened(x, weights, biases, self.screens[self.buffers.layer], norm)
        return super().linears(x, weights, biases, relu, norm, scales)

    def _empty(self, *shape: int) -> Tensor:
        return self.buffers.take(shape)

    def _compute(self, kernel: str, inputs: tuple[object, ...], *arguments: float) -> None:
        super()._compute(kernel, inputs, *arguments)
        given = (self._index, torch.get_num_threads(), *arguments)
        self.words.extend((CALLS.index(kernel), len(given), *map(_word, given)))


@dataclass(frozen=True)
class _Capture:
    """Of a number of tokens: the calls, and where the last layer's output is."""

    words: array[int]
    hidden: Tensor


class CapturedLayers:
    """Takes the tokens of a step through all layers.

    Args:
        group: ranks that exchange nothing with other processes, and a KernelArithmetic.
        layers: weights; they, the caches and the screens stay where they are.
        screens: of each layer's fc1, or none.
    """

    def __init__(
        self,
        config: OPTConfig,
        group: RankGroup,
        layers: list[Weights],
        caches: list[LayerCache],
        screens: Sequence[Screen] = (),
    ):
        assert isinstance(group.arithmetic, KernelArithmetic)
        self._config, self._group, self._layers, self._caches = config, group, layers, caches
        self._screens = screens
        self._arithmetic = group.arithmetic
        self._buffers = _Buffers()
        self._slots, self._positions = (torch.zeros(MOST_TOKENS, dtype=torch.int64) for _ in range(2))
        self._hidden = torch.empty(MOST_TOKENS, config.hidden_size)
        self._forget()

    def _forget(self) -> None:
        self._captures: dict[int, _Capture] = {}
        self._settings: tuple[int, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other addresses.
        return {**self.__dict__, "_captures": {}, "_settings": None}

    def hidden(self, tokens: int) -> Tensor:
        """float32 `(tokens, hidden)`, from which `run` takes what is before the first layer."""
        return self._hidden[:tokens]

    def run(self, step: Step) -> Tensor:
        """float32 `(t, hidden)`, after the last layer; the next call overwrites it."""
        tokens, settings = len(step.tokens), (torch.get_num_threads(), self._arithmetic.rounds_factors())
        if settings != self._settings:
            self._forget()
            self._settings = settings
        inputs = ((self._slots, step.slots), (self._positions, step.positions))
        here = [buffer[:tokens].copy_(given) for buffer, given in inputs]
        if tokens in self._captures:
            replay(self._captures[tokens].words, self)
        else:
            given = replace(step, slots=here[0], positions=here[1])
            self._captures[tokens] = self._capture(self._hidden[:tokens], given)
        return self._captures[tokens].hidden

    def _capture(self, hidden: Tensor, step: Step) -> _Capture:
        options = {one.name: getattr(self._arithmetic, one.name) for one in fields(KernelArithmetic) if one.init}
        arithmetic = _CapturingArithmetic(**options, buffers=self._buffers, screens=self._screens)
        program = OPTRankProgram(self._config, replace(self._group, arithmetic=arithmetic))
        attention = KernelAttention(step, program.scale, arithmetic.compute_dtype, arithmetic)
        for index, (weights, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            self._buffers.begin(index)
            hidden = program.layer(weights, hidden, attention.over(cache))
        return _Capture(arithmetic.words, hidden)


def _word(argument: float) -> int:
    """What the kernels take in place of a number: itself, or if it is a float, the bits of a double."""
    bits: int = struct.unpack("q", struct.pack("d", argument))[0] if isinstance(argument, float) else argument
    return bits
