"""Products and layernorms: the only place where 16-bit and int8 weights are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


# torch.nn.LayerNorm's default, which OPT uses.
LAYER_NORM_EPS = 1e-5

# Products with int8 weights are sums of activations times whole numbers up to 127, which can leave float16's range
# (65,504) where the scaled result does not. In float16 this factor, which rounds no activation from 2^-9 up, keeps
# sums in range for results of up to 16,000 times the largest weight of their channel. Float32 and bfloat16 have
# range enough.
_FLOAT16_HEADROOM = 2.0**-5


class LayerNorm(NamedTuple):
    """A layernorm's float32 weight and bias `(n,)`, or neither."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Arithmetic:
    """How a target computes. This class uses only operations that every compiler and device supports.

    Args:
        compute_dtype: dtype that both factors of a product have: float32 on `cpu`; `amp` on `neuron`, whose matrix
            units accumulate in float32. A product of 16-bit factors is rounded to their dtype, and returned as
            float32.
    """

    compute_dtype: torch.dtype = torch.float32

    def linears(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor] | None = None,
        relu: bool = False,
        norm: LayerNorm | None = None,
        scales: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """For each weight `scale * (x @ weight.T) + bias`.

        Args:
            x: float32 `(…, in)`.
            weights: `(out, in)` each.
            biases: `(out,)` each, one a weight; None for none of them.
            relu: negative results become 0.
            norm: what x goes through before.
            scales: float32 `(out, 1)` each, one for every weight if weights are int8; None otherwise.

        Returns:
            float32 `(…, out)` each.
        """
        if norm is not None:
            x = self.layer_norm(x, norm)
        none = [None] * len(weights)
        parts = zip(weights, biases or none, scales or none, strict=True)
        sums = [self.linear_sum([x], [weight], bias, scale=scale) for weight, bias, scale in parts]
        return [torch.relu(y) for y in sums] if relu else sums

    def linear_sum(
        self,
        xs: list[Tensor],
        weights: list[Tensor],
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The sum of `scale * (x @ weight.T)`, the bias and the residual.

        Args:
            xs: float32 `(…, in)` each.
            weights: `(out, in)` each, one for every x.
            bias: `(out,)`.
            residual: float32 `(…, out)`.
            scale: float32 `(out, 1)`, the same for every weight, if weights are int8; None otherwise.

        Returns:
            float32 `(…, out)`.
        """
        if narrow := scale is not None and self.compute_dtype == torch.float16:
            xs = [x * _FLOAT16_HEADROOM for x in xs]
        total = None
        for x, weight in zip(xs, weights, strict=True):
            y = torch.nn.functional.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype)).float()
            total = y if total is None else total + y
        assert total is not None
        if scale is not None:
            # The product is scaled, not the weight, as in NxD's quantized layers: whole numbers up to 127 are exact
            # in every dtype, so weights are not rounded again; and a device multiplies `out` values, not `out * in`.
            total = total * (scale.squeeze(1) / _FLOAT16_HEADROOM if narrow else scale.squeeze(1))
        total = total if bias is None else total + bias.float()
        return total if residual is None else residual + total

    def layer_norm(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """float32 layernorm of float32 `(…, n)` over the last dimension."""
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
        return normed if norm.weight is None or norm.bias is None else normed * norm.weight + norm.bias
