"""The rank program, cut into the stages that are compiled apart.

Layers are alike, so one compiled layer serves all of them and compile time does not grow with depth. Weights are
arguments. Embedding a few tokens is a look-up, and stays with the runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...graphs import SHORTEST_BUCKET
from ...kv_cache import LayerCache, cache_shape
from ...modeling_opt import OPTRankProgram
from ...parallel import RankGroup, Weights
from ...products import Products
from ...sampling import GREEDY, MAX_SUPPRESSED, select_tokens


# Up to so many rows, a compiled step's products are fused into one pass over the weights (see products.py). Beyond
# it, unrolled rows outgrow the vector registers.
FUSED_ROWS = 8


StageExport = Callable[[], torch.export.ExportedProgram]


@dataclass(frozen=True)
class Stages:
    """The compiled (or eager) stages; see `OPTRankProgram` for their arguments and results.

    context_layer: `(weights, hidden, keys, values, positions)` → hidden, for any number of new tokens.
    token_layer: the same for one.
    head: `(weights, hidden (b, hidden), params, uniforms, suppressed)` → (tokens, logits).
    """

    context_layer: Callable[..., Tensor]
    token_layer: Callable[..., Tensor]
    head: Callable[..., tuple[Tensor, Tensor]]


class _Layer(torch.nn.Module):
    def __init__(self, program: OPTRankProgram):
        super().__init__()
        self.program = program

    def forward(
        self, weights: Weights, hidden: Tensor, keys: list[Tensor], values: list[Tensor], positions: Tensor
    ) -> Tensor:
        return self.program.layer(weights, hidden, keys, values, positions, prompt=False)


class _Head(torch.nn.Module):
    def __init__(self, program: OPTRankProgram, max_topk: int):
        super().__init__()
        self.program, self.max_topk = program, max_topk

    def forward(
        self, weights: Weights, hidden: Tensor, params: Tensor, uniforms: Tensor, suppressed: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self.program.logits(weights, hidden)
        return select_tokens(logits, params, uniforms, suppressed, self.max_topk), logits


def eager_stages(config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup) -> Stages:
    """The stages, uncompiled."""
    program = OPTRankProgram(config, group)
    return Stages(_Layer(program), _Layer(program), _Head(program, neuron_config.max_topk))


def export_stages(
    config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup, weights: ModelWeights
) -> dict[str, StageExport]:
    """For each stage's name, a function that exports it.

    Prompt and cache lengths are dynamic, all else is static. The weights serve as examples: shapes, strides and dtypes
    of theirs go into the graph, their values do not.
    """
    batch = neuron_config.batch_size
    rows = FUSED_ROWS if batch <= FUSED_ROWS else 0
    prompt_program = OPTRankProgram(config, group)
    step_program = OPTRankProgram(config, dataclasses.replace(group, products=Products(fused_rows=rows)))
    # At the full length a view of the cache is contiguous, which torch.export takes for another case. The code for
    # the others serves it as well: strides are those of the whole cache in either.
    longest = neuron_config.sequence_length - 1
    new, length = (Dim(name, min=SHORTEST_BUCKET, max=longest) for name in ("new", "length"))
    # Unequal, for torch.export takes equal ones for one.
    example_new, example_length = SHORTEST_BUCKET, max(SHORTEST_BUCKET + 1, longest // 2)
    shape = cache_shape(config, neuron_config)
    cache = LayerCache(*([torch.zeros(shape, dtype=neuron_config.cache_dtype) for _ in group.ranks] for _ in "kv"))
    keys, values = cache.first(example_length)

    def layer(program: OPTRankProgram, n: int, dynamic_n: Any) -> torch.export.ExportedProgram:
        hidden, positions = torch.zeros(batch, n, config.hidden_size), torch.zeros(batch, n, dtype=torch.int32)
        arguments = (weights.layers[0], hidden, keys, values, positions)
        cached = [{2: length}] * group.world_size
        dynamic = (_static(weights.layers[0]), dynamic_n, cached, cached, dynamic_n)
        return torch.export.export(_Layer(program), arguments, dynamic_shapes=dynamic)

    def head() -> torch.export.ExportedProgram:
        arguments = (
            weights.head,
            torch.zeros(batch, config.hidden_size),
            torch.tensor([GREEDY]).repeat(batch, 1),
            torch.zeros(batch),
            torch.full((batch, MAX_SUPPRESSED), -1, dtype=torch.int32),
        )
        return torch.export.export(_Head(step_program, neuron_config.max_topk), arguments)

    return {
        "context_layer": lambda: layer(prompt_program, example_new, {1: new}),
        "token_layer": lambda: layer(step_program, 1, None),
        "head": head,
    }


def _static(weights: Weights) -> dict[str, Any]:
    return {name: [None] * len(shards) for name, shards in weights.items()}
