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
        CONTEXT_ENCODING: max(moments(config, setup, setup.sequence_length, prompt=True)),
        TOKEN_GENERATION: max(moments(config, setup, 1, prompt=False)),
    }


def prompt_scores(config: OPTConfig, setup: Setup) -> int:
    """Bytes of the float32 attention scores of one rank and layer, for the longest prompts."""
    return _scores(config, setup, setup.sequence_length)


def _scores(config: OPTConfig, setup: Setup, n: int) -> int:
    heads = config.num_attention_heads // setup.tp_degree
    return setup.batch_size * heads * n * setup.sequence_length * _F32


def _neuron_moments(config: OPTConfig, setup: Setup, n: int, prompt: bool) -> tuple[int, ...]:
    tokens, ranks = setup.batch_size * n, setup.tp_degree
    hidden = tokens * config.hidden_size
    residual, normed, summand = hidden * _F32, hidden * setup.compute_bytes, hidden * _F32
    scores = 0 if prompt else 2 * _scores(config, setup, n)
    # Query, key, value, and what is mixed of the values.
    attention = residual + normed + 4 * hidden // ranks * _F32 + scores + summand
    mlp = residual + normed + tokens * config.ffn_dim // ranks * _F32 + summand
    # The rank's logits, those of all ranks, and a copy without the suppressed tokens.
    head = setup.batch_size * (config.hidden_size + 3 * config.vocab_size) * _F32
    return attention, mlp, head


def _cpu_moments(config: OPTConfig, setup: Setup, n: int, prompt: bool) -> tuple[int, ...]:
    tokens, ranks = setup.batch_size * n, setup.tp_degree
    hidden, inner = tokens * config.hidden_size * _F32, tokens * config.ffn_dim * _F32
    base = 2 * hidden  # the residual, and the layernorm of it

    # Where the last rank masks its scores: three tensors of them and the mask; query, key, value and scaled query;
    # keys and values as the cache rounds them; what is mixed for the ranks before.
    rounded = 2 * hidden // ranks * setup.cache_bytes // _F32 if prompt and setup.cache_bytes < _F32 else 0
    mask = tokens * setup.sequence_length
    scores = 3 * _scores(config, setup, n) + mask
    attention = base + 3 * hidden + hidden // ranks + rounded + hidden * (ranks - 1) // ranks + scores

    # Projections of the attention: all but the last output is there, and the last one's matrix is converted.
    square = _converted(setup, (config.hidden_size // ranks, config.hidden_size))
    projections = base + 3 * hidden + square

    matrix = _converted(setup, (config.ffn_dim // ranks, config.hidden_size))
    activated = base + 2 * inner
    down = base + inner + ranks * hidden + matrix

    words = -(-config.vocab_size // ranks)
    head = _converted(setup, (words, config.word_embed_proj_dim)) + setup.batch_size * 2 * config.vocab_size * _F32
    return attention, projections, activated, down, hidden + head


def _converted(setup: Setup, shape: tuple[int, ...]) -> int:
    """A matrix of the checkpoint in float32, if it is not stored so."""
    return 0 if setup.weight_bytes == _F32 else prod(shape) * _F32
