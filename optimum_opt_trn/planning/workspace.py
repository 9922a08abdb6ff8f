"""How much a graph needs beside weights and cache: the tensors of the rank program at its widest moment.

The list follows `modeling_opt.py`, whose dtypes and shapes it repeats: `b` rows, `n` new tokens, `c` cached positions,
`R` ranks. Of each part (attention, MLP, head) the moment with the most bytes is counted, and of these the largest; in
between, memory is used again.

- On `neuron` it is what one core needs. The scores of a prompt, `(b, heads / R, n, n)`, are not counted: the compiler
  works on tiles of them that fit the core's 24 MiB of on-chip memory ("For an inference kernel, scratchpad usage is
  usually determined by the size of hidden states": AWS Neuron documentation, "Neuron Device Memory"). `prompt_scores`
  says what they would take if it did not.
- On `cpu` it is what the process needs that holds all ranks, with the compiled kernels: they read 16-bit weights as
  they are, and allocate nothing but what they return. Tokens are packed, and the longest prompts fill every slot; of
  those, a slot after another goes through PyTorch's flash attention, which makes no scores. What a thread allocates
  for itself is `CPU_THREAD_BYTES`. Without the kernels it is more (docs/memory.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import OPTConfig

    from .memory import Setup


CONTEXT_ENCODING = "context_encoding"
TOKEN_GENERATION = "token_generation"

_F32 = 4

# Up to so many tokens of a slot are attended to by the kernel (LONG_RUN in targets/cpu/packed_attention.py).
_LONG_RUN = 16

# What a thread has at most at a time on `cpu`: a panel of weights (PANELS * DEPTH * PANEL floats in kernels.cpp, with
# AVX-512 4 * 1024 * 48 of them: 0.75 MiB) or the blocks of flash attention (256 queries by 512 keys, two sums a query,
# and their result: 0.57 MiB with heads of 64). Either stays with the C library when the other is allocated.
CPU_THREAD_BYTES = 3 * 2**19


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
    # Slot and position in int64, ids in int32, the slots in use; the layer's input, which is the caller's.
    indices = tokens * (8 + 8 + 4) + setup.batch_size * 8
    held = indices + hidden

    # Embedding, where ranks have a part of the vocabulary each: those of all ranks, the last rank's again, two sums;
    # or two more of the last rank while zeros replace the words that it has not. Ids and a mask.
    part = tokens * config.word_embed_proj_dim * _F32
    embedded = indices + tokens * (4 + 1) + (ranks + 1 + min(ranks - 1, 2)) * part if ranks > 1 else 0

    # Attention: query, key, value, and what is mixed of the values; then their product, one tensor however many ranks.
    # (The layernorm before is gone when the values are mixed.)
    # Of a slot and rank at a time, keys and values as the cache has them, in float32; flash attention's result, a
    # float32 for each query and head, and the result of the slot before.
    attended = held + 4 * hidden
    heads, width = config.num_attention_heads // ranks, config.hidden_size // ranks
    converted = 2 if setup.cache_bytes < _F32 else 0
    results = min(setup.batch_size, 2)
    slot = n * ((converted + results) * width + heads) * _F32 if n >= _LONG_RUN else 0

    # MLP: what attention returned; the inner units, beside the layernorm before them, or once more after an activation
    # that the kernel has not, or with the layer's output.
    mlp = held + hidden + inner
    activated = inner if config.activation_function != "relu" else 0

    # Head: the last layer's output of each slot's last token; their logits, four more tensors of that size or nearly
    # (13 bytes for each logit) and two of the vocabulary's. That is sampling with suppressed ids; greedy search needs
    # less.
    words = -(-config.vocab_size // ranks) * ranks
    last = setup.batch_size * config.hidden_size
    selected = 13 * setup.batch_size * config.vocab_size + 2 * config.vocab_size * _F32
    head = indices + (last + setup.batch_size * words) * _F32 + selected
    return embedded, attended + slot, attended + hidden, mlp + max(activated, hidden), head
