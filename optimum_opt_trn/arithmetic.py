"""Products and layernorms: the one place where a 16-bit weight meets arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


# torch.nn.LayerNorm's default, which OPT uses.
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Arithmetic:
    """How a target computes; as it stands, in operations that every compiler and device takes.

    Args:
        compute_dtype: dtype that both factors of a product have: float32 on `cpu`; `amp` on `neuron`, whose matrix
            units accumulate in float32. What a product returns is float32, but of 16-bit factors rounded to their
            dtype before.
    """

    compute_dtype: torch.dtype = torch.float32

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`relu(x @ weight.T + bias) + residual`, each of the three where it is asked for.

        Args:
            x: float32 `(…, in)`.
            weight: `(out, in)`.
            bias: `(out,)`.
            relu: negative sums become 0.
            residual: float32 `(…, out)`.

        Returns:
            float32 `(…, out)`.
        """
        y = torch.nn.functional.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype)).float()
        y = y if bias is None else y + bias.float()
        y = torch.relu(y) if relu else y
        return y if residual is None else residual + y

    def linears(self, x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, relu: bool) -> list[Tensor]:
        """`linear` of one x with several weights, each with its bias if there are any."""
        if biases is None:
            return [self.linear(x, weight, relu=relu) for weight in weights]
        return [self.linear(x, weight, bias, relu) for weight, bias in zip(weights, biases, strict=True)]

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """float32 layernorm of float32 `(…, n)` over the last dimension; weight and bias `(n,)`, or neither."""
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
        return normed if weight is None or bias is None else normed * weight + bias
