"""Calls the compiled graphs: tokens in, tokens and logits out; weights and cache stay on the cores.

A step is packed, and graphs have static shapes of a whole batch. Here, and only here, steps are padded to buckets and
cut into calls of graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...buckets import extension_length, smallest_bucket
from ...configuration_opt import OPTNeuronConfig
from ...model.sampling import SamplingInputs
from ..base import Runtime, Step, StepResult
from .process import check_fork
from .rank_module import NO_PLACE, sampling_arguments


# A slot with its tokens in a step.
Run = tuple[int, slice]


_LOGITS_ONLY = "the graphs return logits only; an export that is loaded with eager=True, on the host's CPU, has it"


class NeuronRuntime(Runtime):
    """A model that NxD has loaded.

    Args:
        neuron_config: what the model was exported for.
        model: takes the six arguments of a graph (see `rank_module`) and returns tokens and logits.
    """

    def __init__(self, neuron_config: OPTNeuronConfig, model: Callable[..., tuple[Tensor, Tensor]]):
        self.neuron_config = neuron_config
        self.model = model
        self.unserved = {"output_hidden_states": _LOGITS_ONLY, "output_attentions": _LOGITS_ONLY}
        if not neuron_config.prompt_embeddings:
            self.unserved["inputs_embeds"] = (
                "the graphs of this export take token ids; export the model again with prompt_embeddings=True"
            )
        self.windows = {length: torch.zeros(length, dtype=torch.int32) for length in neuron_config.cache_buckets}

    def step(self, step: Step) -> StepResult:
        """See `Runtime`. Each prompt has a call of its own. Other slots that need the same graph share its calls: at
        most one for all single tokens, and as many for longer runs, and for those that are given by embeddings, as
        `speculation` needs for the longest."""
        runs: dict[str, list[Run]] = {
            "context_encoding": [],
            "token_generation": [],
            "speculation": [],
            "prompt_embeddings": [],
        }
        wanted = set(step.wanted.tolist())
        for slot, tokens in step.runs:
            inner = any(token in wanted for token in range(tokens.start, tokens.stop - 1))
            if int(step.tokens[tokens.start]) < 0:
                runs["prompt_embeddings"].append((slot, tokens))
            elif int(step.positions[tokens.start]) == 0 and not inner:
                runs["context_encoding"].append((slot, tokens))
            else:
                single = tokens.stop - tokens.start == 1
                runs["token_generation" if single else "speculation"].append((slot, tokens))
        call = _Call(step, self.neuron_config.batch_size)
        for slot, tokens in runs["context_encoding"]:
            self._context_encoding(call, slot, tokens)
        if runs["token_generation"]:
            self._token_generation(call, runs["token_generation"])
        if runs["speculation"]:
            self._speculation(call, runs["speculation"], step.tokens)
        if runs["prompt_embeddings"]:
            assert step.embeddings is not None
            given = torch.zeros(len(step.tokens), step.embeddings.shape[1])
            given[step.tokens < 0] = step.embeddings
            self._speculation(call, runs["prompt_embeddings"], given)
        return call.result()

    def copy(self, sources: Tensor, length: int) -> None:
        """See `Runtime`. The graph copies whole slots."""
        if self.neuron_config.batch_size > 1:
            greedy = SamplingInputs.greedy(self.neuron_config.batch_size)
            self._run(sources, NO_PLACE, NO_PLACE, greedy)

    def _context_encoding(self, call: _Call, slot: int, tokens: slice) -> None:
        """One prompt into its slot; no other slot takes part."""
        length = tokens.stop - tokens.start
        ids = torch.zeros(1, smallest_bucket(self.neuron_config.prompt_buckets, length), dtype=torch.int32)
        ids[0, :length] = call.step.tokens[tokens]
        place = torch.tensor([slot], dtype=torch.int32)
        chosen, logits = self._run(ids, torch.tensor([length]), place, call.sampling.of_rows(place.long()))
        call.take(tokens.stop - 1, logits[0], chosen[0])

    def _token_generation(self, call: _Call, runs: list[Run]) -> None:
        slots = torch.tensor([slot for slot, _ in runs])
        places = torch.tensor([tokens.start for _, tokens in runs])
        ids = torch.zeros(call.batch_size, dtype=torch.int32)
        positions = torch.full((call.batch_size,), -1, dtype=torch.int32)
        ids[slots], positions[slots] = call.step.tokens[places], call.step.positions[places].to(torch.int32)
        bucket = smallest_bucket(self.neuron_config.cache_buckets, int(positions.max()) + 1)
        chosen, logits = self._run(ids, positions, self.windows[bucket], call.sampling)
        for slot, tokens in runs:
            call.take(tokens.start, logits[slot], chosen[slot])

    def _speculation(self, call: _Call, runs: list[Run], given: Tensor) -> None:
        """In pieces; a shorter run repeats its last token at its place, which writes there what is there.

        `given` are the step's tokens, as ids `(t,)` or as embeddings `(t, dim)`, which another graph takes.
        """
        size = extension_length(self.neuron_config.sequence_length)
        longest = max(tokens.stop - tokens.start for _, tokens in runs)
        for start in range(0, longest, size):
            ids = torch.zeros(call.batch_size, size, *given.shape[1:], dtype=given.dtype)
            positions = torch.full((call.batch_size, size), -1, dtype=torch.int32)
            for slot, tokens in runs:
                places = torch.arange(tokens.start + start, tokens.start + start + size).clamp(max=tokens.stop - 1)
                ids[slot], positions[slot] = given[places], call.step.positions[places].to(torch.int32)
            chosen, logits = self._run(ids, positions, NO_PLACE, call.sampling)
            for slot, tokens in runs:
                piece = range(tokens.start + start, min(tokens.stop, tokens.start + start + size))
                for column, token in enumerate(piece):
                    call.take(token, logits[slot, column], chosen[slot])

    def _run(
        self, tokens: Tensor, positions: Tensor, place: Tensor, sampling: SamplingInputs
    ) -> tuple[Tensor, Tensor]:
        check_fork()
        tokens = tokens if tokens.is_floating_point() else tokens.to(torch.int32)
        positions = positions.to(torch.int32)
        return self.model(tokens, positions, place, *sampling_arguments(sampling))


class _Call:
    """A step whose results arrive graph by graph."""

    def __init__(self, step: Step, batch_size: int):
        self.step = step
        self.batch_size = batch_size
        self._sampled = step.wanted[step.sampled]
        self.sampling = step.sampling.of_batch(step.slots[self._sampled], batch_size)
        # By the token's index in the step.
        self._logits: dict[int, Tensor] = {}
        self._following: dict[int, Tensor] = {}

    def take(self, token: int, logits: Tensor, following: Tensor) -> None:
        """Notes a token's logits `(vocabulary,)`, and the token that follows."""
        self._logits[token], self._following[token] = logits, following

    def result(self) -> StepResult:
        """What is wanted, of all that has arrived."""
        logits = [self._logits[token] for token in self.step.wanted.tolist()]
        following = [self._following[token] for token in self._sampled.tolist()]
        vocabulary = len(next(iter(self._logits.values())))
        return StepResult(
            torch.stack(following) if following else torch.empty(0, dtype=torch.int32),
            torch.stack(logits) if logits else torch.empty(0, vocabulary),
        )
