"""The rank program as neuronx-distributed wants it: a module of one rank, whose parameters are weights and caches.

NxD traces rank 0, and the same graphs serve every rank, each with its own tensors. It finds the graph for a call by
the shapes of the arguments alone, takes no other number of arguments than the first graph has, and one structure of
results. Hence all graphs share the six arguments and the results below:

| graph | tokens | positions | place | tokens, logits |
|---|---|---|---|---|
| `context_encoding`, for each prompt bucket n | `(1, n)` | `(1,)`, the length | `(1,)`, the slot | `(1,)`, `(1, vocabulary)` |
| `token_generation`, for each cache bucket c | `(b,)` | `(b,)` | `(c,)`, not read | `(b,)`, `(b, vocabulary)` |
| `speculation`, of k tokens | `(b, k)` | `(b, k)` | `(1,)`, not read | `(b,)`, `(b, k, vocabulary)` |
| `prompt_embeddings`, if the export has it | float32 `(b, k, dim)` | `(b, k)` | `(1,)`, not read | `(b,)`, `(b, k, vocabulary)` |
| `cache_copy`, for more slots than one | `(b,)`, sources | `(1,)`, not read | `(1,)`, not read | of no meaning |

with `params`, `uniforms` and `suppressed` of `SamplingInputs` in all, a row for each row of tokens.

Caches are read as they were before the step, and written when everything else is computed, so that no product waits
for a write.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from ...buckets import extension_length
from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.arithmetic import Arithmetic
from ...model.attention import MASKED, StaticAttention, write_tokens
from ...model.parallel import RankGroup, Weights
from ...model.program import OPTRankProgram
from ...model.sampling import Candidates, SamplingInputs, TopK, candidates, draw_tokens, join_candidates
from ...model.shapes import cache_shape


# Results that callers see; the states come behind them.
VISIBLE_RESULTS = 2

NO_PLACE = torch.zeros(1, dtype=torch.int32)

# The parameter, int32 `(1,)`, that tells each rank which one it is: the graph is that of rank 0.
RANKS = "ranks"


@dataclass(frozen=True)
class DeviceOperators:
    """What a graph takes from the SDK.

    Args:
        all_reduce, all_gather: the collectives of the ranks, see `RankGroup`.
        put_slot: the cache `(b, h, c, d)` with `(1, h, n, d)` at the start of the slot int32 `(1,)`.
        top_k: see `TopK`.
    """

    all_reduce: Callable[[Tensor], Tensor]
    all_gather: Callable[[Tensor], Tensor]
    put_slot: Callable[[Tensor, Tensor, Tensor], Tensor]
    top_k: TopK


class RankModule(nn.Module):
    """One graph's module.

    Args:
        graph: a name in the table above.
        config, neuron_config: the model and the export.
        shapes: the shape and dtype of each of the rank's weights, by the names that `parameters_of` gives them.
        operators: what the SDK has for it.
    """

    def __init__(
        self,
        graph: str,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        shapes: dict[str, tuple[torch.Size, torch.dtype]],
        operators: DeviceOperators,
    ):
        super().__init__()
        self.graph = graph
        self.operators = operators
        self.max_topk = neuron_config.max_topk
        self.amp, self.cache_dtype = neuron_config.amp_dtype, neuron_config.cache_dtype
        arithmetic, self.world = Arithmetic(self.amp), neuron_config.tp_degree
        # Without other ranks, there is nothing to exchange.
        group = RankGroup(self.world, (0,), arithmetic)
        if self.world > 1:
            # What is summed was rounded to `amp` by the product before; half the bytes are sent.
            reduce, gather = operators.all_reduce, operators.all_gather
            group = RankGroup(self.world, (0,), arithmetic, reduce, gather, reduce_dtype=self.amp)
        self.program = OPTRankProgram(config, group)
        self.layers = config.num_hidden_layers
        self.weights = list(shapes)
        self.states = [f"{kind}_{index}" for index in range(self.layers) for kind in ("keys", "values")]
        shape = cache_shape(config, neuron_config)
        self.head_size = shape[3]
        for name, (size, dtype) in (shapes | dict.fromkeys(self.states, (shape, self.cache_dtype))).items():
            # Only shapes are traced. Memory that is never written is never taken from the host.
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False))

    def forward(
        self, tokens: Tensor, positions: Tensor, place: Tensor, params: Tensor, uniforms: Tensor, suppressed: Tensor
    ) -> tuple[Tensor, ...]:
        """Next tokens, logits, and the new states, in the order of `states`."""
        states = [getattr(self, name) for name in self.states]
        if self.graph == "cache_copy":
            return self._copy(tokens, states)
        prompt, window, ids, places = self.graph == "context_encoding", None, tokens, positions
        if prompt:
            places = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)[None]
        elif self.graph == "token_generation":
            ids, places, window = tokens.unsqueeze(1), positions.unsqueeze(1), place.shape[0]
        if self.graph == "prompt_embeddings":
            hidden = self.program.place(self._part("embed"), tokens, places)
        else:
            hidden = self.program.embed(self._part("embed"), ids, places, getattr(self, RANKS))
        new: list[Tensor] = []
        for index in range(self.layers):
            caches = None if prompt else [(states[2 * index], states[2 * index + 1])]
            attend = StaticAttention(
                caches, places, self.head_size, self.program.scale, self.cache_dtype, self.amp, window
            )
            hidden = self.program.layer(self._part(f"layer_{index}"), hidden, attend)
            new += attend.new[0]
        if prompt:
            hidden = hidden.index_select(1, (positions - 1).clamp(min=0))
        # A head that is tied to the embedding has no tensor of its own.
        tied = {"lm_head.weight": self._part("embed")["embed_tokens.weight"]}
        part = self.program.logit_parts(tied | self._part("head"), hidden)[0]
        chosen = draw_tokens(*self._candidates(part[:, -1], suppressed), params, uniforms)
        logits = self.program.join_logits([part])
        if self.graph not in ("speculation", "prompt_embeddings"):
            logits = logits.squeeze(1)
        if prompt:
            written = [self.operators.put_slot(state, x, place) for state, x in zip(states, new, strict=True)]
        else:
            written = [write_tokens(state, x, places) for state, x in zip(states, new, strict=True)]
        return chosen, logits, *written

    def _candidates(self, part: Tensor, suppressed: Tensor) -> Candidates:
        """The best of this rank's words, then of all ranks': nobody looks through the whole vocabulary."""
        size, vocabulary = part.shape[1], self.program.vocab_size
        words = torch.arange(size, dtype=torch.int32, device=part.device) + getattr(self, RANKS) * size
        if size * self.world > vocabulary:  # the last words are padding
            part = torch.where(words < torch.full_like(words, vocabulary), part, torch.full_like(part, MASKED))
        found = candidates(part, words, suppressed, self.max_topk, self.operators.top_k)
        if self.world == 1:
            return found
        gather, rows, k = self.operators.all_gather, part.shape[0], found.best.shape[1]
        # Two tensors are sent: logits, and the words of both kinds.
        both = gather(torch.cat([found.words, found.first[:, None]], dim=1)).reshape(rows, self.world, k + 1)
        parts = Candidates(gather(found.best), both[:, :, :k].flatten(1), both[:, :, k])
        return join_candidates(parts, self.max_topk, self.operators.top_k)

    def _copy(self, sources: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Whole slots, one after the other, read where they were last written: in place, with one slot on the way.

        Reading all slots first would have the compiler keep a second cache, or copy it. It is not needed: no slot is
        both copied from and copied to (see `Runtime.copy`).
        """
        slots = torch.arange(len(sources), dtype=torch.int32, device=sources.device).split(1)
        copied = []
        for state in states:
            for slot, source in zip(slots, sources.split(1), strict=True):
                state = self.operators.put_slot(state, state.index_select(0, source), slot)
            copied.append(state)
        return sources + slots[0], sources.float(), *copied

    def _part(self, prefix: str) -> Weights:
        """The weights of a part, as the rank program takes them; looked up anew, since tracing swaps them."""
        names = [name for name in self.weights if name.startswith(f"{prefix}__")]
        return {name.removeprefix(f"{prefix}__").replace("__", "."): [getattr(self, name)] for name in names}


def example_inputs(config: OPTConfig, neuron_config: OPTNeuronConfig) -> dict[str, list[tuple[Tensor, ...]]]:
    """For each graph, the arguments that it is traced with, a tuple for each bucket."""
    b, k = neuron_config.batch_size, extension_length(neuron_config.sequence_length)
    one, sampling = (sampling_arguments(SamplingInputs.greedy(rows)) for rows in (1, b))

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    graphs: dict[str, list[tuple[Tensor, ...]]] = {
        "context_encoding": [(integers(1, n), integers(1), NO_PLACE, *one) for n in neuron_config.prompt_buckets],
        "token_generation": [(integers(b), integers(b), integers(c), *sampling) for c in neuron_config.cache_buckets],
        "speculation": [(integers(b, k), integers(b, k), NO_PLACE, *sampling)],
    }
    if neuron_config.prompt_embeddings:
        embeddings = torch.zeros(b, k, config.word_embed_proj_dim)
        graphs["prompt_embeddings"] = [(embeddings, integers(b, k), NO_PLACE, *sampling)]
    if b > 1:
        graphs["cache_copy"] = [(integers(b), integers(1), NO_PLACE, *sampling)]
    return graphs


def sampling_arguments(sampling: SamplingInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The last three arguments of every graph."""
    return sampling.params.float(), sampling.uniforms.float(), sampling.suppressed.to(torch.int32)


def parameters_of(weights: ModelWeights, ranks: int) -> Iterator[list[dict[str, Tensor]]]:
    """The weights part by part (the ranks' numbers, embeddings, head, each layer), each as one dictionary a rank.

    The tensors are those of `weights`, views of the mapped checkpoint, which are not read here. A part is dropped from
    `weights` before the next is made. A head that is tied to the embedding is left out.

    Args:
        weights: of `ranks` local ranks; left empty.
    """
    if weights.head["lm_head.weight"] is weights.embed["embed_tokens.weight"]:
        del weights.head["lm_head.weight"]
    yield [{RANKS: weights.ranks[rank : rank + 1]} for rank in range(ranks)]
    yield _of_ranks("embed", weights.embed, ranks)
    yield _of_ranks("head", weights.head, ranks)
    for index in range(len(weights.layers)):
        yield _of_ranks(f"layer_{index}", weights.layers.pop(0), ranks)


def _of_ranks(part: str, weights: Weights, ranks: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    while weights:
        name, tensors = weights.popitem()
        for rank, named in enumerate(shards):
            named[f"{part}.{name}".replace(".", "__")] = tensors[rank if len(tensors) > 1 else 0]
    return shards
