"""The rank program as neuronx-distributed wants it: a module of one rank, whose parameters are weights and caches.

NxD traces rank 0, and the same graphs serve every rank, each with its own tensors. It finds the graph for a call by
the shapes of the arguments alone, takes no other number of arguments than the first graph has, and one structure of
results. Hence all graphs share the six arguments and the results below:

| graph | tokens | positions | window | tokens, logits |
|---|---|---|---|---|
| `context_encoding`, for each prompt bucket n | `(b, n)` | `(b,)`, lengths | `(1,)` | `(b,)`, `(b, vocabulary)` |
| `token_generation`, for each cache bucket c | `(b,)` | `(b,)` | `(c,)` | `(b,)`, `(b, vocabulary)` |
| `speculation`, of k tokens | `(b, k)` | `(b, k)` | `(1,)` | `(b,)`, `(b, k, vocabulary)` |
| `cache_copy`, for more slots than one | `(b,)`, sources | `(1,)`, the length | `(1,)` | of no meaning |

with `params`, `uniforms` and `suppressed` of a `SamplingInputs` in all. Nothing reads the values of `window`, which is
there for its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.arithmetic import Arithmetic
from ...model.attention import StaticAttention
from ...model.parallel import RankGroup, Weights
from ...model.program import OPTRankProgram, last_token, prompt_positions
from ...model.sampling import SamplingInputs, sample_tokens
from ...model.shapes import cache_shape


# Tokens that one run of `speculation` takes; longer calls are cut, shorter ones filled up. The weights are read once
# for all of them, and a NeuronCore's matrix unit works on up to 128 rows at a time (awsdocs-neuron, "NeuronCore-v2
# Architecture"), so that sixteen cost hardly more than one; assisted generation asks for 5 to 21 (transformers'
# num_assistant_tokens, plus one).
EXTENSION = 16

# Results that callers see; the states come behind them.
VISIBLE_RESULTS = 2

NO_WINDOW = torch.zeros(1, dtype=torch.int32)

# The parameter, int32 `(1,)`, that tells each rank which one it is: the graph is that of rank 0.
RANKS = "ranks"


class RankModule(nn.Module):
    """One graph's module.

    Args:
        graph: a name in the table above.
        config, neuron_config: the model and the export.
        shapes: the shape and dtype of each of the rank's weights, by the names that `parameters_of` gives them.
        all_reduce, all_gather: the collectives of the ranks, see `RankGroup`.
    """

    def __init__(
        self,
        graph: str,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        shapes: dict[str, tuple[torch.Size, torch.dtype]],
        all_reduce: Callable[[Tensor], Tensor],
        all_gather: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.graph = graph
        self.max_topk = neuron_config.max_topk
        self.compute_dtype = neuron_config.amp_dtype
        world = neuron_config.tp_degree
        arithmetic = Arithmetic(neuron_config.amp_dtype)
        # Alone, a rank has nothing to exchange.
        group = RankGroup(world, (0,), arithmetic)
        if world > 1:
            group = RankGroup(world, (0,), arithmetic, all_reduce, all_gather)
        self.program = OPTRankProgram(config, group)
        self.layers = config.num_hidden_layers
        self.weights = list(shapes)
        self.states = [f"{kind}_{index}" for index in range(self.layers) for kind in ("keys", "values")]
        cache = (torch.Size(cache_shape(config, neuron_config)), neuron_config.cache_dtype)
        for name, (shape, dtype) in (shapes | dict.fromkeys(self.states, cache)).items():
            # Zeros, for what is traced are shapes; memory of them is not touched until it is.
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def forward(
        self, tokens: Tensor, positions: Tensor, window: Tensor, params: Tensor, uniforms: Tensor, suppressed: Tensor
    ) -> tuple[Tensor, ...]:
        """Next tokens, logits, and the new states, in the order of `states`."""
        # States are results of the graph, not parameters that it changes: the rank program writes to copies.
        states = [getattr(self, name).clone() for name in self.states]
        if self.graph == "cache_copy":
            return self._copy(tokens, positions, states)
        prompt = self.graph == "context_encoding"
        if prompt:
            ids, places, read = tokens, prompt_positions(positions, tokens.shape[1]), None
        elif self.graph == "token_generation":
            ids, places, read = tokens.unsqueeze(1), positions.unsqueeze(1), window.shape[0]
        else:
            ids, places, read = tokens, positions, None
        hidden = self.program.embed(self._part("embed"), ids, places, getattr(self, RANKS))
        for index in range(self.layers):
            keys, values = states[2 * index], states[2 * index + 1]
            attend = StaticAttention([keys], [values], places, prompt, self.program.scale, self.compute_dtype, read)
            hidden = self.program.layer(self._part(f"layer_{index}"), hidden, attend)
        if prompt:
            hidden = last_token(hidden, positions)
        elif self.graph == "token_generation":
            hidden = hidden.squeeze(1)
        # A head that is tied to the embedding has no tensor of its own.
        tied = {"lm_head.weight": self._part("embed")["embed_tokens.weight"]}
        logits = self.program.logits(tied | self._part("head"), hidden)
        last = logits[:, -1] if logits.dim() == 3 else logits
        return sample_tokens(last, params, uniforms, suppressed, self.max_topk), logits, *states

    def _copy(self, sources: Tensor, length: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        moved = torch.arange(states[0].shape[2], dtype=torch.int32, device=length.device) < length
        copied = [torch.where(moved[:, None], state.index_select(0, sources), state) for state in states]
        return sources + length, (sources + length).float(), *copied

    def _part(self, prefix: str) -> Weights:
        """The weights of a part, as the rank program takes them; looked up anew, since tracing swaps them."""
        names = [name for name in self.weights if name.startswith(f"{prefix}__")]
        return {name.removeprefix(f"{prefix}__").replace("__", "."): [getattr(self, name)] for name in names}


def example_inputs(neuron_config: OPTNeuronConfig) -> dict[str, list[tuple[Tensor, ...]]]:
    """For each graph, the arguments that it is traced with, a tuple for each bucket."""
    b, k = neuron_config.batch_size, extension_length(neuron_config)
    sampling = sampling_arguments(SamplingInputs.greedy(b))

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    graphs: dict[str, list[tuple[Tensor, ...]]] = {
        "context_encoding": [
            (integers(b, n), integers(b), NO_WINDOW, *sampling) for n in neuron_config.prompt_buckets
        ],
        "token_generation": [(integers(b), integers(b), integers(c), *sampling) for c in neuron_config.cache_buckets],
        "speculation": [(integers(b, k), integers(b, k), NO_WINDOW, *sampling)],
    }
    if b > 1:
        graphs["cache_copy"] = [(integers(b), integers(1), NO_WINDOW, *sampling)]
    return graphs


def extension_length(neuron_config: OPTNeuronConfig) -> int:
    """Tokens that one run of `speculation` takes."""
    return min(EXTENSION, neuron_config.sequence_length)


def sampling_arguments(sampling: SamplingInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The last three arguments of every graph."""
    return sampling.params.float(), sampling.uniforms.float(), sampling.suppressed.to(torch.int32)


def parameters_of(weights: ModelWeights, ranks: int) -> Iterator[list[dict[str, Tensor]]]:
    """The weights part by part (the ranks' numbers, embeddings, head, each layer), each as one dictionary a rank.

    A part is dropped from `weights` before the next is made, and only then are its shards made contiguous: no more
    than one is staged at a time. A head that is tied to the embedding is left out.

    Args:
        weights: of `ranks` local ranks; left empty.
    """
    if weights.head["lm_head.weight"] is weights.embed["embed_tokens.weight"]:
        del weights.head["lm_head.weight"]
    yield [{RANKS: weights.ranks[rank : rank + 1].contiguous()} for rank in range(ranks)]
    yield _of_ranks("embed", weights.embed, ranks)
    yield _of_ranks("head", weights.head, ranks)
    for index in range(len(weights.layers)):
        yield _of_ranks(f"layer_{index}", weights.layers.pop(0), ranks)


def _of_ranks(part: str, weights: Weights, ranks: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    while weights:
        name, tensors = weights.popitem()
        for rank, named in enumerate(shards):
            tensor = tensors[rank if len(tensors) > 1 else 0]
            named[f"{part}.{name}".replace(".", "__")] = tensor.contiguous()
    return shards
