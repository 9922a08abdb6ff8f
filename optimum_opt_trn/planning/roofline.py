"""The roofline: the highest speed of a plan that the bandwidth and the arithmetic of a core allow.

A decode step reads the weights and the cache once. A prefill multiplies every token with every matrix. Each takes at
least as long as reading its bytes and as computing its operations. What ranks send each other is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ..checkpoint.layout import HEAD, TOKEN_EMBEDDINGS
from ..model.shapes import ModelShape
from .memory import MemoryPlan, plan_memory, rank_tensors


# The share of the roofline to expect. AWS measured OPT-13B (8 cores), 30B (8) and 66B (24) on inf2.48xlarge
# with transformers-neuronx at batch size 1 and 2048 positions: 19.8, 40.1 and 35.4 ms a token, which is 39, 44 and
# 36 % of the roofline (AWS Neuron documentation 2.13, "Inf2 Performance"; docs/memory.md has the sums). No
# figures are published for the prefill of an OPT; the same share is assumed.
REALISTIC_SHARE = 0.4


@dataclass(frozen=True)
class Roofline:
    """The shortest time of a plan's two graphs, at their largest buckets.

    Args:
        batch_size: rows of each graph.
        decode_bytes: bytes that a core reads in a step, with the cache full.
        decode_seconds: seconds that a step takes.
        prefill_flops: operations of a core, with all prompts at full length.
        prefill_seconds: seconds that all prompts take together.
        prompt_tokens: tokens of all prompts together.
    """

    batch_size: int
    decode_bytes: int
    decode_seconds: float
    prefill_flops: float
    prefill_seconds: float
    prompt_tokens: int

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch_size / self.decode_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds


def roofline(config: ModelShape, plan: MemoryPlan) -> Roofline | None:
    """The roofline of `plan`; None if bandwidth and arithmetic of the instance are not published (`cpu`)."""
    bandwidth, flops = plan.instance.core_bandwidth, plan.instance.core_flops
    if bandwidth is None or flops is None:
        return None
    setup = plan.setup
    held, tables = list(rank_tensors(config, setup)), ["embed_positions.weight"]
    # Only the tokens' rows of a table are read. The embedding counts if it is the head, too.
    if any(tensor.name == HEAD for tensor in held):
        tables.append(TOKEN_EMBEDDINGS)
    read = [tensor for tensor in held if not tensor.name.endswith(tuple(tables))]
    weights = sum(tensor.count * tensor.bytes for tensor in read)
    # A multiplication and an addition for each element of a matrix and token; the head only for each row's last token.
    matrices = [tensor for tensor in read if tensor.name.endswith(".weight") and len(tensor.shape) == 2]
    head = [tensor for tensor in matrices if tensor.name.endswith((TOKEN_EMBEDDINGS, HEAD))]
    per_token = 2 * sum(tensor.count * prod(tensor.shape) for tensor in matrices if tensor not in head)
    per_row = 2 * sum(prod(tensor.shape) for tensor in head)
    # Scores, and sums of values weighted by them, over `sequence_length` positions.
    width = config.hidden_size // setup.tp_degree
    attended = 4 * config.num_hidden_layers * width * setup.sequence_length

    rows, prompt_tokens = setup.batch_size, setup.batch_size * setup.sequence_length
    decode_bytes = weights + plan.cache
    decode_flops = rows * (per_token + attended + per_row)
    prefill_flops = prompt_tokens * (per_token + attended) + rows * per_row
    return Roofline(
        batch_size=rows,
        decode_bytes=decode_bytes,
        decode_seconds=max(decode_bytes / bandwidth, decode_flops / flops),
        prefill_flops=prefill_flops,
        prefill_seconds=max(decode_bytes / bandwidth, prefill_flops / flops),
        prompt_tokens=prompt_tokens,
    )


def decode_curve(config: ModelShape, plan: MemoryPlan, batch_sizes: list[int]) -> list[float]:
    """Tokens per second of decoding at each of the batch sizes, at the full roofline; empty without a roofline."""
    lines = [
        roofline(config, plan_memory(config, replace(plan.setup, batch_size=size), plan.instance))
        for size in batch_sizes
    ]
    return [line.decode_tokens_per_second for line in lines if line is not None]
