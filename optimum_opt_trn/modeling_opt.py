"""The rank program: what the ranks held here compute, once for every target.

It has four parts, each a method with its weights as arguments, so that a target may compile them together or apart:
`embed`, `layer` (one compiled layer serves all), `logits`, and token selection, which is in `sampling.py`. Shapes are
static; in them `b` is the batch (slots), `n` the new tokens of a call, `c` the cache bucket, `h` the heads of a rank,
`d` the head's size. The residual stream, layernorms, softmax and logits are float32 everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTConfig
from transformers.activations import ACT2FN

from .parallel import RankGroup, Weights


# OPT's learned positions begin at row 2 of their table
# (transformers, models/opt/modeling_opt.py, OPTLearnedPositionalEmbedding).
POSITION_OFFSET = 2

# torch.nn.LayerNorm's default, which OPT uses.
LAYER_NORM_EPS = 1e-5

# Finite, since -inf in a mask makes NaN on Neuron; exp of it is 0 in float32.
MASKED = -1e30


class OPTRankProgram:
    """OPT for the ranks of `group`: 125M to 175B, the post-layernorm 350M, and Galactica-like variants."""

    def __init__(self, config: OPTConfig, group: RankGroup):
        self.group = group
        self.products = group.products
        self.heads = config.num_attention_heads // group.world_size
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.vocab_size = config.vocab_size
        self.pre_layer_norm = config.do_layer_norm_before
        self.final_layer_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.activation = ACT2FN[config.activation_function]

    def embed(self, w: Weights, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int32 ids and positions `(b, n)` → float32 `(b, n, hidden)`; idle rows have position -1."""
        hidden = self.group.embedding(input_ids, w["embed_tokens.weight"], w["ranks"][0])
        if "project_in.weight" in w:
            hidden = self.products.linear(hidden, w["project_in.weight"][0])
        return hidden + F.embedding(positions.clamp(min=0) + POSITION_OFFSET, w["embed_positions.weight"][0])

    def layer(
        self,
        w: Weights,
        hidden: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        positions: Tensor,
        prompt: bool,
        window: int | None = None,
    ) -> Tensor:
        """One decoder layer, which writes its keys and values of the new tokens to the cache.

        Args:
            hidden: float32 `(b, n, hidden)`.
            keys, values: for each local rank, the first `c` positions of its cache, `(b, h, c, d)`; changed in place.
            positions: int32 `(b, n)`, where in its slot each new token is; -1 throughout a row that is idle, whose
                slot stays as it is.
            prompt: the new tokens are all there is, at positions 0 to n - 1 (the graph `context_encoding`). Else each
                attends to what the cache holds up to its position.
            window: reads the first so many of the `c` positions alone, by default all. For XLA, which rebuilds a
                whole tensor for a view of it that is written: there the cache is passed whole, and read in part.

        Returns:
            float32 `(b, n, hidden)`.
        """
        if self.pre_layer_norm:
            normed = layer_norm(hidden, w, "self_attn_layer_norm")
            hidden = hidden + self._attention(w, normed, keys, values, positions, prompt, window)
            return hidden + self._mlp(w, layer_norm(hidden, w, "final_layer_norm"))
        hidden = hidden + self._attention(w, hidden, keys, values, positions, prompt, window)
        hidden = layer_norm(hidden, w, "self_attn_layer_norm")
        return layer_norm(hidden + self._mlp(w, hidden), w, "final_layer_norm")

    def logits(self, w: Weights, hidden: Tensor) -> Tensor:
        """float32 `(…, hidden)` → float32 `(…, vocabulary)`."""
        if self.final_layer_norm:
            hidden = layer_norm(hidden, w, "final_layer_norm")
        if "project_out.weight" in w:
            hidden = self.products.linear(hidden, w["project_out.weight"][0])
        parts = self.group.column(hidden, w["lm_head.weight"], None)
        # The words that padding the vocabulary added are cut off again.
        return self.group.gather(parts)[..., : self.vocab_size]

    def _attention(
        self,
        w: Weights,
        x: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        positions: Tensor,
        prompt: bool,
        window: int | None,
    ) -> Tensor:
        column = self.group.column
        query, key, value = (
            column(x, w[f"self_attn.{name}_proj.weight"], w.get(f"self_attn.{name}_proj.bias")) for name in "qkv"
        )
        mixed = []
        for rank, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            q, k, v = self._split_heads(q * self.scale), self._split_heads(k), self._split_heads(v)
            write_cache(keys[rank], k, positions, prompt)
            write_cache(values[rank], v, positions, prompt)
            # A prompt attends to what later steps will read: keys and values as the cache rounds them.
            k, v = (k.to(keys[rank].dtype), v.to(values[rank].dtype)) if prompt else (keys[rank], values[rank])
            if window is not None and not prompt:
                k, v = k[:, :, :window], v[:, :, :window]
            seen = torch.arange(k.shape[2], dtype=torch.int32, device=x.device) <= positions[:, None, :, None]
            scores = self.products.scores(q, k)
            scores = torch.where(seen, scores, torch.full_like(scores, MASKED))
            mixed.append(self._join_heads(self.products.mix(torch.softmax(scores, dim=-1), v)))
        return self.group.row(mixed, w["self_attn.out_proj.weight"], w.get("self_attn.out_proj.bias"))

    def _mlp(self, w: Weights, x: Tensor) -> Tensor:
        inner = [self.activation(y) for y in self.group.column(x, w["fc1.weight"], w.get("fc1.bias"))]
        return self.group.row(inner, w["fc2.weight"], w.get("fc2.bias"))

    def _split_heads(self, x: Tensor) -> Tensor:
        """`(b, n, h * d)` → `(b, h, n, d)`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _join_heads(x: Tensor) -> Tensor:
        """`(b, h, n, d)` → `(b, n, h * d)`."""
        return x.transpose(1, 2).flatten(2)


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """float32 layernorm over the last dimension; without the affine part where `w` has none of it."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LAYER_NORM_EPS)
    if f"{name}.weight" not in w:
        return normed
    return normed * w[f"{name}.weight"][0] + w[f"{name}.bias"][0]


def write_cache(cache: Tensor, new: Tensor, positions: Tensor, prompt: bool) -> None:
    """Writes `new` `(b, h, n, d)` to `cache` `(b, h, c, d)`: at the start of the slots, or at int32 `(b, n)`.

    Rows whose positions are -1 are idle, and left as they are.
    """
    busy = (positions >= 0)[:, None, :, None]
    if prompt:
        start = cache[:, :, : new.shape[2]]
        start.copy_(torch.where(busy, new.to(cache.dtype), start))
    else:
        # Adjacent indices: with a slice among them, XLA would transpose the whole cache and back.
        rows, heads = (torch.arange(size, dtype=torch.int32, device=cache.device) for size in cache.shape[:2])
        places = (rows[:, None, None], heads[:, None], positions.clamp(min=0)[:, None])
        cache[places] = torch.where(busy, new.to(cache.dtype), cache[places])


def prompt_positions(lengths: Tensor, n: int) -> Tensor:
    """int32 `(b, n)`: 0 to n - 1, or -1 in the rows of int32 lengths `(b,)` that are 0, which are idle."""
    places = torch.arange(n, dtype=torch.int32, device=lengths.device)[None, :]
    return torch.where(lengths[:, None] > 0, places, torch.full_like(places, -1))


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """`(b, n, hidden)` → `(b, hidden)`, that of each row's last token; int32 lengths `(b,)`, 0 in idle rows."""
    index = (lengths.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index).squeeze(1)
