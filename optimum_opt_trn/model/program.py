"""The rank program: what the ranks of one process compute, the same for every target.

It has three parts, each a method with its weights as arguments: `embed`, `layer` and `logits`. Token sampling follows,
in `sampling.py`. A target chooses how products and layernorms are computed (`arithmetic.py`), and the layout of new
tokens: rows of a batch in static shapes (`attention.py`), or packed without padding. The residual stream, layernorms,
softmax and logits are float32 on every target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import OPTConfig
from transformers.activations import ACT2FN

from .arithmetic import LayerNorm
from .attention import Attend
from .parallel import RankGroup, Weights


# OPT's learned positions begin at row 2 of their table
# (transformers, models/opt/modeling_opt.py, OPTLearnedPositionalEmbedding).
POSITION_OFFSET = 2

_QKV_WEIGHTS, _QKV_BIASES, _QKV_SCALES = (
    [f"self_attn.{name}_proj.{kind}" for name in "qkv"] for kind in ("weight", "bias", "weight_scale")
)


class OPTRankProgram:
    """OPT for the ranks of `group`: 125M to 175B, the post-layernorm 350M, and Galactica-like variants."""

    def __init__(self, config: OPTConfig, group: RankGroup):
        self.group = group
        self.arithmetic = group.arithmetic
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.pre_layer_norm = config.do_layer_norm_before
        self.final_layer_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        self.activation = None if config.activation_function == "relu" else ACT2FN[config.activation_function]

    def embed(self, w: Weights, input_ids: Tensor, positions: Tensor, ranks: Tensor) -> Tensor:
        """int32 ids and positions `(…)`, -1 in idle rows, and ranks `(local ranks,)` → float32 `(…, hidden)`."""
        return self.place(w, self.group.embedding(input_ids, w["embed_tokens.weight"], ranks), positions)

    def place(self, w: Weights, embeddings: Tensor, positions: Tensor) -> Tensor:
        """float32 `(…, word_embed_proj_dim)` of tokens, at int32 positions `(…)` → float32 `(…, hidden)`."""
        if "project_in.weight" in w:
            (embeddings,) = self.arithmetic.linears(embeddings, w["project_in.weight"][:1])
        return embeddings + F.embedding(positions.clamp(min=0) + POSITION_OFFSET, w["embed_positions.weight"][0])

    def layer(self, w: Weights, hidden: Tensor, attend: Attend) -> Tensor:
        """One decoder layer: float32 `(…, hidden)` → the same.

        Args:
            attend: writes the new tokens' keys and values to the cache, and attends to all that is there.
        """
        if self.pre_layer_norm:
            hidden = self._attention(w, hidden, attend, _norm(w, "self_attn_layer_norm"))
            return self._mlp(w, hidden, _norm(w, "final_layer_norm"))
        hidden = self.arithmetic.layer_norm(self._attention(w, hidden, attend), _norm(w, "self_attn_layer_norm"))
        return self.arithmetic.layer_norm(self._mlp(w, hidden), _norm(w, "final_layer_norm"))

    def logits(self, w: Weights, hidden: Tensor) -> Tensor:
        """float32 `(…, hidden)` → float32 `(…, vocabulary)`."""
        return self.join_logits(self.logit_parts(w, hidden))

    def logit_parts(self, w: Weights, hidden: Tensor) -> list[Tensor]:
        """float32 `(…, hidden)` → for each local rank, its words' float32 `(…, vocabulary / world)`."""
        norm = _norm(w, "final_layer_norm") if self.final_layer_norm else None
        if "project_out.weight" in w:
            (hidden,), norm = self.arithmetic.linears(hidden, w["project_out.weight"][:1], norm=norm), None
        return self.arithmetic.linears(hidden, w["lm_head.weight"], norm=norm, scales=w.get("lm_head.weight_scale"))

    def last_hidden_state(self, w: Weights, hidden: Tensor) -> Tensor:
        """float32 `(…, hidden)` after the last layer → what the head gets, float32 `(…, word_embed_proj_dim)`."""
        if self.final_layer_norm:
            hidden = self.arithmetic.layer_norm(hidden, _norm(w, "final_layer_norm"))
        if "project_out.weight" in w:
            (hidden,) = self.arithmetic.linears(hidden, w["project_out.weight"][:1])
        return hidden

    def join_logits(self, parts: list[Tensor]) -> Tensor:
        """The parts of all ranks → float32 `(…, vocabulary)`."""
        # Without the words that padding added to the vocabulary.
        return self.group.gather(parts)[..., : self.vocab_size]

    def _attention(self, w: Weights, hidden: Tensor, attend: Attend, norm: LayerNorm | None = None) -> Tensor:
        weights = [shard for name in _QKV_WEIGHTS for shard in w[name]]
        biases = [shard for name in _QKV_BIASES for shard in w.get(name, ())] or None
        scales = [shard for name in _QKV_SCALES for shard in w.get(name, ())] or None
        outputs, ranks = (
            self.arithmetic.linears(hidden, weights, biases, norm=norm, scales=scales),
            len(self.group.ranks),
        )
        mixed = [attend(rank, *outputs[rank::ranks]) for rank in range(ranks)]
        out = "self_attn.out_proj"
        return self.group.row(mixed, w[f"{out}.weight"], w.get(f"{out}.bias"), hidden, w.get(f"{out}.weight_scale"))

    def _mlp(self, w: Weights, hidden: Tensor, norm: LayerNorm | None = None) -> Tensor:
        relu, scales = self.activation is None, w.get("fc1.weight_scale")
        inner = self.arithmetic.linears(hidden, w["fc1.weight"], w.get("fc1.bias"), relu, norm, scales)
        if self.activation is not None:
            inner = [self.activation(y) for y in inner]
        return self.group.row(inner, w["fc2.weight"], w.get("fc2.bias"), hidden, w.get("fc2.weight_scale"))


def _norm(w: Weights, name: str) -> LayerNorm:
    weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    return LayerNorm(weight[0] if weight else None, bias[0] if bias else None)
