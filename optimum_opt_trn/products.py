"""Products with weights and with the cache: the one place where a 16-bit tensor meets arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """How a target multiplies.

    Args:
        compute_dtype: dtype that both factors of a product have: float32 on `cpu`; `amp` on `neuron`, whose matrix
            units accumulate in float32. What a product returns is float32, but of 16-bit factors rounded to their
            dtype before.
        fused_rows: products of at most so many rows are written as multiply-and-sum. A compiler fuses that with the
            conversion of the 16-bit factor into one pass over the memory; run eagerly it would be slow, hence 0.
    """

    compute_dtype: torch.dtype = torch.float32
    fused_rows: int = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: x float32 `(…, in)`, weight `(out, in)`, bias `(out,)` → float32 `(…, out)`."""
        rows = x.numel() // x.shape[-1] if self.fused_rows else 0
        if 0 < rows <= self.fused_rows:
            # Rows are unrolled, so that all of them share one pass over the weight.
            sums = [(row * weight.float()).sum(-1) for row in x.reshape(rows, x.shape[-1]).unbind(0)]
            y = torch.stack(sums).reshape(*x.shape[:-1], weight.shape[0])
        else:
            y = torch.nn.functional.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype)).float()
        return y if bias is None else y + bias.float()

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """`query @ keys.T`: query float32 `(b, h, n, d)`, keys `(b, h, c, d)` → float32 `(b, h, n, c)`."""
        if self.fused_rows and query.shape[2] == 1:
            return (query * keys.float()).sum(-1).unsqueeze(2)
        return torch.matmul(query.to(self.compute_dtype), keys.to(self.compute_dtype).transpose(-1, -2)).float()

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """`weights @ values`: weights float32 `(b, h, n, c)`, values `(b, h, c, d)` → float32 `(b, h, n, d)`."""
        if self.fused_rows and weights.shape[2] == 1:
            return (weights.transpose(2, 3) * values.float()).sum(2, keepdim=True)
        return torch.matmul(weights.to(self.compute_dtype), values.to(self.compute_dtype)).float()
