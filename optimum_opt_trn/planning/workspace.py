"""Workspace: the memory that a graph needs in addition to weights and cache.

The sums follow the tensors of `model/program.py`, whose dtypes and shapes they repeat: `b` rows, `n` new tokens, `c`
cached positions, `R` ranks. For each part of a graph (attention, MLP, head) the moment with the most bytes is counted.
The largest of these sums is what the graph needs, since its parts use the same memory one after the other.

- On `neuron` it is what one core needs. A prompt is a call of its own, of one row; all rows of a batch share the calls
  of the other graphs. The scores of a prompt, `(1, heads / R, n, n)`, are not counted: the compiler works on tiles of
  them that fit the core's 24 MiB of on-chip memory ("For an inference kernel, scratchpad usage is usually determined
  by the size of hidden states": AWS Neuron documentation, "Neuron Device Memory"). `prompt_scores` says how much they
  would take without tiles.
- On `cpu` it is what the process that holds all ranks needs, with the kernels. They read 16-bit weights and caches
  directly, and allocate only their results. Tokens are packed, and the longest prompts fill every slot. A thread's own
  buffers are `CPU_THREAD_BYTES`. Without the kernels it is more (docs/memory.md).
"""

from __future__ import annotations

from ..buckets import extension_length
from ..dtypes import DTYPES
from ..model.shapes import ModelShape
from .setup import Setup


CONTEXT_ENCODING = "context_encoding"
TOKEN_GENERATION = "token_generation"
SPECULATION = "speculation"

_F32 = DTYPES["f32"].bytes

# Bytes that a thread of the kernels on `cpu` holds at most: its scratch memory (SCRATCH floats in csrc/pool.h), for a
# panel of converted weights, or a block of attention.
CPU_THREAD_BYTES = 270_336 * 4
# Elements of hidden states that are embedded at a time there (MOST_ELEMENTS in targets/cpu/one_thread.py).
CPU_EMBEDDED = 32_768


def graph_workspace(config: ModelShape, setup: Setup, on_neuron: bool) -> dict[str, int]:
    """Bytes that each graph needs at most at a time, at its largest bucket."""
    if on_neuron:
        calls = {
            CONTEXT_ENCODING: (1, setup.sequence_length),
            TOKEN_GENERATION: (setup.batch_size, 1),
            SPECULATION: (setup.batch_size, extension_length(setup.sequence_length)),
        }
        return {graph: max(_neuron_moments(config, setup, graph, *call)) for graph, call in calls.items()}
    return {
        CONTEXT_ENCODING: max(_cpu_moments(config, setup, setup.sequence_length)),
        TOKEN_GENERATION: max(_cpu_moments(config, setup, 1)),
    }


def prompt_scores(config: ModelShape, setup: Setup) -> int:
    """Bytes of the float32 attention scores of one rank and layer, for the longest prompt."""
    return _scores(config, setup, setup.sequence_length, setup.sequence_length)


def _scores(config: ModelShape, setup: Setup, tokens: int, positions: int) -> int:
    return config.num_attention_heads // setup.tp_degree * tokens * positions * _F32


def _neuron_moments(config: ModelShape, setup: Setup, graph: str, rows: int, n: int) -> tuple[int, ...]:
    tokens, ranks = rows * n, setup.tp_degree
    prompt = graph == CONTEXT_ENCODING
    hidden = tokens * config.hidden_size
    residual, normed, summand = hidden * _F32, hidden * setup.compute_bytes, hidden * _F32
    # Of cached positions and of new tokens, each before and after the softmax.
    scores = 0 if prompt else 2 * _scores(config, setup, tokens, setup.sequence_length + n)
    # Query, key, value, and the weighted sum of values.
    attention = residual + normed + 4 * hidden // ranks * _F32 + scores + summand
    mlp = residual + normed + tokens * config.ffn_dim // ranks * _F32 + summand
    # For the tokens whose logits are returned, the rank's logits and those of all ranks; and for each row a copy of
    # the rank's without the suppressed tokens.
    wanted, words = rows if prompt else tokens, -(-config.vocab_size // ranks)
    head = wanted * (config.hidden_size + words * (1 + ranks)) + rows * words
    return attention, mlp, head * _F32


def _cpu_moments(config: ModelShape, setup: Setup, n: int) -> tuple[int, ...]:
    tokens, ranks = setup.batch_size * n, setup.tp_degree
    hidden, inner = tokens * config.hidden_size * _F32, tokens * config.ffn_dim * _F32
    # Slots and positions in int64, ids in int32, the slots in use in int64; and the layer's input.
    indices = tokens * (8 + 8 + 4) + setup.batch_size * 8
    held = indices + hidden

    # Embedding, of some tokens at a time, if each rank has a part of the vocabulary: the rows of all ranks, those of
    # the last rank again, and two sums; or two more of the last rank, while zeros replace the words of other ranks.
    # Also ids and a mask.
    some = min(tokens, max(1, CPU_EMBEDDED // config.hidden_size))
    part = some * config.word_embed_proj_dim * _F32
    embedded = held + some * (4 + 4 + 1) + (ranks + 1 + min(ranks - 1, 2)) * part if ranks > 1 else 0

    # Attention: query, key, value and the weighted sum of values; then their product, one tensor for all ranks. (The
    # result of the layernorm is free by then.)
    attended = held + 5 * hidden

    # MLP: the result of attention and the inner units; with them the layernorm's result, or the inner units again
    # after an activation that the kernel does not have, or the layer's output.
    mlp = held + hidden + inner
    activated = inner if config.activation_function != "relu" else 0

    # Head: the logits of the last tokens, and once more where the parts of several ranks are joined. Sampling needs
    # 37 bytes more for each of the best tokens.
    words = -(-config.vocab_size // ranks) * ranks
    last = setup.batch_size * config.hidden_size
    head = indices + (last + setup.batch_size * words * min(ranks, 2)) * _F32
    return embedded, attended, mlp + max(activated, hidden), head


def cpu_buffers(config: ModelShape, threads: int) -> int:
    """Bytes that the kernels hold on `cpu` between steps: those of each thread, fc2's partial sums, captured layers'.

    Of fc2 there are sums of 8 rows (MOST_UNIT_ROWS) for every 512 units (GROUP in csrc/units.h), and the values of
    its units.
    """
    sums = -(-config.ffn_dim // 512) * 8 * config.hidden_size * _F32
    return threads * CPU_THREAD_BYTES + sums + config.ffn_dim * (8 + 1) * _F32 + captured_bytes(config)


def captured_bytes(config: ModelShape) -> int:
    """Bytes of the results of captured layers (targets/cpu/captured.py), for 48 tokens (MOST_NORMED_ROWS).

    Of two layers: query, key, value, the weighted sum of values, the results of attention and of the MLP, those of
    layernorms behind them, and the inner units. Before them, the first layer's input, a slot and a position.
    """
    if config.activation_function != "relu":
        return 0  # they are not captured
    results = (6 if config.do_layer_norm_before else 8) * config.hidden_size + config.ffn_dim
    return 48 * ((2 * results + config.hidden_size) * _F32 + 2 * 8)
