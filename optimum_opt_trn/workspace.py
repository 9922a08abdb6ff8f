"""How much a graph needs beside weights and cache: the tensors of the rank program at its widest moment.

The list follows `modeling_opt.py`, whose dtypes and shapes it repeats: `b` rows, `n` new tokens, `c` cached positions,
`R` ranks. Of each part (attention, MLP, head) the moment with the most bytes is counted, and of these the largest; in
between, memory is used again.

- On `neuron` it is what one core needs. The scores of a prompt, `(b, heads / R, n, n)`, are not counted: the compiler
  works on tiles of them that fit the core's 24 MiB of on-chip memory ("For an inference kernel, scratchpad usage is
  usually determined by the size of hidden states": AWS Neuron documentation, "Neuron Device Memory"). `prompt_scores`
  says what they would take if it did not.
- On `cpu` it is what the process needs that holds all ranks, run eagerly: where the mask is applied there are three
  tensors of scores, and a 16-bit matrix is converted to float32 whole. Compiled graphs fuse some of this.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import OPTConfig

    from .memory import Setup


CONTEXT_ENCODING = "context_encoding"
TOKEN_GENERATION = "token_generation"

_F32 = 4


def graph_workspace(config: OPTConfig, setup: Setup, on_neuron: bool) -> dict[str, int]:
    """For each graph, at its largest bucket, the bytes that it needs at its widest moment."""
    moments = _neuron_moments if on_neuron else _cpu_moments
    return {
        CONTEXT_ENCODING: max(moments(config, setup, setup.sequence_length)),
        TOKEN_GENERATION: max(moments(config, setup, 1)),
    }


def prompt_scores(config: OPTConfig, setup: Setup) -> int:
    """Bytes of the float32 attention scores of one rank and layer, for the longest prompts."""
    return _scores(config, setup, setup.sequence_length)


def _scores(config: OPTConfig, setup: Setup, n: int) -> int:
    heads = config.num_attention_heads // setup.tp_degree
    return setup.batch_size * heads * n * setup.sequence_length * _F32


def _neuron_moments(config: OPTConfig, setup: Setup, n: int) -> tuple[int, ...]:
    tokens, ranks = setup.batch_size * n, setup.tp_degree
    hidden = tokens * config.hidden_size
    residual, normed, summand = hidden * _F32, hidden * setup.compute_bytes, hidden * _F32
    scores = 0 if n > 1 else 2 * _scores(config, setup, n)
    # Query, key, value, and what is mixed of the values.
    attention = residual + normed + 4 * hidden // ranks * _F32 + scores + summand
    mlp = residual + normed + tokens * config.ffn_dim // ranks * _F32 + summand
    # The rank's logits, those of all ranks, and a copy without the suppressed tokens.
    head = setup.batch_size * (config.hidden_size + 3 * config.vocab_size) * _F32
    return attention, mlp, head


def _cpu_moments(config: OPTConfig, setup: Setup, n: int) -> tuple[int, ...]:
    tokens, ranks = setup.batch_size * n, setup.tp_degree
    hidden, inner = tokens * config.hidden_size * _F32, tokens * config.ffn_dim * _F32
    # Summands of all ranks; with the first sum of two there is another tensor, while the next is made two.
    summands = ranks * hidden
    sums = min(ranks - 1, 2) * hidden

    # Attention, in the loop over ranks: the layer's input and the layernorm of it; query, key and value of all ranks;
    # the last rank's scaled query, its mask.
    held = 5 * hidden + hidden // ranks + tokens * setup.sequence_length
    before = hidden * (ranks - 1) // ranks  # what was mixed for the ranks before
    scores = _scores(config, setup, n)
    masked = held + before + 3 * scores
    cached = setup.batch_size * setup.sequence_length * config.hidden_size // ranks * _F32
    mixed = held + hidden + 2 * scores + (cached if setup.cache_bytes < _F32 else 0)
    square = _converted(setup, (config.hidden_size // ranks, config.hidden_size))
    projected = 5 * hidden + square
    output = held + hidden + scores + summands + max(square, sums)

    # MLP: input and layernorm of attention and of MLP; before and after the activation.
    matrix = _converted(setup, (config.ffn_dim // ranks, config.hidden_size))
    activated = 4 * hidden + 2 * inner
    up = 4 * hidden + inner + matrix
    down = 4 * hidden + inner + summands + max(matrix, sums)

    # Head: the logits with the matrix; or, where a token is selected, three more tensors of their size and a mask, and
    # two of the vocabulary's.
    words = -(-config.vocab_size // ranks)
    logits = setup.batch_size * config.vocab_size * _F32
    selected = 13 * logits // 4 + 2 * config.vocab_size * _F32
    head = hidden + logits + max(_converted(setup, (words, config.word_embed_proj_dim)), selected)
    return masked, mixed, projected, output, activated, up, down, head


def _converted(setup: Setup, shape: tuple[int, ...]) -> int:
    """A matrix of the checkpoint in float32, if it is not stored so."""
    return 0 if setup.weight_bytes == _F32 else prod(shape) * _F32
