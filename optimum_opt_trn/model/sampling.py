"""Token sampling on the device.

Random numbers come from the host, one uniform number for each row and step. The device inverts the cumulative
distribution with them. So a seed gives the same tokens on every target and at every tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import MASKED


# How many token ids a step can exclude (end-of-sequence ids, until the minimum length is reached).
MAX_SUPPRESSED = 8

# Each row's parameters: top_k, top_p, temperature (optimum-neuron's three, in its order) and min_p. These are greedy.
GREEDY = (1.0, 1.0, 1.0, 0.0)

# A weight relative to the best token's, too small to change a sum of float32 weights.
NEVER_DRAWN = 1e-30

# Larger than any token id.
LAST_WORD = 2**31 - 1


@dataclass(frozen=True)
class SamplingInputs:
    """What one step needs to sample the next tokens of `b` rows.

    Args:
        params: float32 `(b, 4)`: top_k, top_p, temperature, min_p of each row. Greedy is top_k 1.
        uniforms: float32 `(b,)` in [0, 1).
        suppressed: int32 `(b, MAX_SUPPRESSED)`, token ids that may not be selected, filled up with -1.
    """

    params: Tensor
    uniforms: Tensor
    suppressed: Tensor

    @classmethod
    def greedy(cls, rows: int) -> SamplingInputs:
        """Takes the best token of each row."""
        suppressed = torch.full((rows, MAX_SUPPRESSED), -1, dtype=torch.int32)
        return cls(torch.tensor([GREEDY]).repeat(rows, 1), torch.zeros(rows), suppressed)

    def of_rows(self, rows: Tensor) -> SamplingInputs:
        """The inputs of the rows `rows`, int64 `(n,)`."""
        return SamplingInputs(self.params[rows], self.uniforms[rows], self.suppressed[rows])

    def of_batch(self, slots: Tensor, batch_size: int) -> SamplingInputs:
        """The inputs of a whole batch, in which row i of these is row `slots[i]`, int64 `(rows,)`; others greedy."""
        if slots.tolist() == [*range(batch_size)]:
            return self
        whole = SamplingInputs.greedy(batch_size)
        whole.params[slots], whole.uniforms[slots] = self.params, self.uniforms
        whole.suppressed[slots] = self.suppressed
        return whole


class Candidates(NamedTuple):
    """The words that `draw_tokens` chooses from.

    Args:
        best: float32 `(b, k)`, the k largest logits of each row, largest first.
        words: int32 `(b, k)`, whose they are.
        first: int32 `(b,)`, the first word that has the largest logit.
    """

    best: Tensor
    words: Tensor
    first: Tensor


# The k largest of each row of float32 `(b, n)`, largest first, and where they are; as torch.topk.
TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def sample_tokens(logits: Tensor, params: Tensor, uniforms: Tensor, suppressed: Tensor, max_topk: int) -> Tensor:
    """Next tokens, int32 `(b,)`, from float32 logits `(b, vocabulary)` and the tensors of `SamplingInputs`.

    In the order of transformers: temperature, then top-k, then top-p of what is left, then min-p. As there, top-k
    keeps all tokens that tie with the k-th (among the `max_topk` best, which is all that is looked at).
    """
    words = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    return draw_tokens(*candidates(logits, words, suppressed, max_topk), params, uniforms)


def candidates(
    logits: Tensor, words: Tensor, suppressed: Tensor, max_topk: int, top_k: TopK = torch.topk
) -> Candidates:
    """The best of `logits` float32 `(b, n)`, those of int32 words `(n,)`, but for suppressed words."""
    masked = torch.full_like(logits, MASKED)
    for ids in suppressed.unbind(dim=1):
        logits = torch.where(words == ids[:, None], masked, logits)
    few = min(max_topk, logits.shape[1])
    best, places = logits.max(-1, keepdim=True) if few == 1 else top_k(logits, few)
    # Of tokens that tie, the first is taken, as by argmax; topk returns them in any order.
    first = torch.where(logits == best[:, :1], words, torch.full_like(words, LAST_WORD)).amin(dim=-1)
    found = first[:, None] if few == 1 else words[0] + places.to(torch.int32)
    return Candidates(best, found, first)


def join_candidates(parts: Candidates, max_topk: int, top_k: TopK = torch.topk) -> Candidates:
    """The best of several ranks' candidates.

    Args:
        parts: `best` and `words` `(b, ranks * k)`; `first` `(b, ranks)`, whose logits are `best[:, ::k]`.
    """
    best, places = top_k(parts.best, min(max_topk, parts.best.shape[1]))
    words = take(parts.words, places.to(torch.int32))
    k = parts.best.shape[1] // parts.first.shape[1]
    largest = parts.best[:, ::k] == best[:, :1]
    first = torch.where(largest, parts.first, torch.full_like(parts.first, LAST_WORD)).amin(dim=-1)
    return Candidates(best, words, first)


def draw_tokens(best: Tensor, words: Tensor, first: Tensor, params: Tensor, uniforms: Tensor) -> Tensor:
    """Next tokens, int32 `(b,)`.

    Args:
        best, words, first: as in `Candidates`.
        params, uniforms: as in `SamplingInputs`.
    """
    top_k, top_p, temperature, min_p = params.split(1, dim=1)
    place = torch.arange(best.shape[1], dtype=torch.int32, device=best.device)[None, :]
    last = torch.minimum(top_k, torch.full_like(top_k, best.shape[1])).to(torch.int32) - 1
    kept = best >= take(best, last)

    scaled = (best - best[:, :1]) / temperature
    weights = torch.where(kept, torch.exp(scaled), torch.zeros_like(scaled))
    before = running_sum(weights) - weights
    best_place = place == torch.zeros_like(place)
    # Tokens are kept until the ones before them reach top_p; the best always is.
    kept = kept & torch.where(best_place, best_place, before < top_p * weights.sum(-1, keepdim=True))
    # The best token's weight is 1, so that weights are probabilities relative to it. Excluded tokens have weight 0,
    # and rounding must not let one be drawn.
    kept = kept & (weights >= min_p.clamp(min=NEVER_DRAWN))
    weights = torch.where(kept, weights, torch.zeros_like(weights))

    cumulative = running_sum(weights)
    total = cumulative[:, -1:]
    # The first place whose cumulative weight exceeds the drawn share; rounding must not lead beyond the last kept.
    drawn = (cumulative <= uniforms[:, None] * total).sum(-1, keepdim=True, dtype=torch.int32)
    drawn = torch.minimum(drawn, kept.sum(-1, keepdim=True, dtype=torch.int32) - 1)
    # Without a second choice there is nothing to draw.
    return torch.where(params[:, 0] > 1.0, take(words, drawn).squeeze(1).to(torch.int32), first)


def take(x: Tensor, places: Tensor) -> Tensor:
    """The entries of each row of `(b, n)` at int32 places `(b, m)`.

    By comparison: torch.gather takes 64-bit indices only, which stay out of a device's graphs.
    """
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    chosen = places[:, :, None] == columns
    return torch.where(chosen, x[:, None], torch.zeros_like(x[:, None])).sum(-1, dtype=x.dtype)


def running_sum(x: Tensor) -> Tensor:
    """The sums of each row up to each place, float32 `(b, n)`.

    By doubling (Hillis and Steele, 1986): only additions, in the same order on every target. On Neuron torch.cumsum
    would be a reduction over windows as wide as the row; optimum-neuron's sampler has a kernel instead.
    """
    shift = 1
    while shift < x.shape[1]:
        x = x + torch.cat([torch.zeros_like(x[:, :shift]), x[:, :-shift]], dim=1)
        shift *= 2
    return x
