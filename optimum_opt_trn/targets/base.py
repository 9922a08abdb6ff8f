"""What every target does: compile an export's graphs, and run them step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from ..model.sampling import SamplingInputs


Result = TypeVar("Result")

# Where an export directory keeps what was compiled.
COMPILED_DIR = "compiled"


class TargetError(RuntimeError):
    """This host, or its SDK, cannot do what was asked for; the message says why, and the way out."""


class Inner(NamedTuple):
    """Whether a step also returns what it computes on the way; see `StepResult`."""

    hidden_states: bool = False
    attentions: bool = False


LOGITS_ONLY = Inner()


@dataclass(frozen=True)
class Step:
    """What a runtime computes at once: packed tokens of any slots, without padding.

    A prompt, a chunk of one, a decoding step and a verification of speculated tokens are all the same thing, and one
    step may hold several of them.

    Args:
        tokens: int32 `(t,)`, at least one. The tokens of a slot are adjacent and in order. -1 stands for a token that
            is given by its embedding; of a slot all are, or none.
        slots: int64 `(t,)`, the slot of each token. No slot appears twice with another slot in between.
        positions: int64 `(t,)`, where in its slot each token goes, ascending by one within a slot. The slot must be
            filled up to its first token.
        wanted: int64 `(w,)`, the indices of the tokens whose logits are wanted, ascending.
        sampling: how next tokens are sampled; one row for each slot whose last token is wanted, in the order of
            `slots`. That is how many next tokens a step returns.
        embeddings: float32 `(e, word_embed_proj_dim)`, of the e tokens that are -1, in their order; None if none is.
        inner: what else is returned. Both this and `embeddings` are only for runtimes that serve them, see
            `Runtime.unserved`.
        logits: whether logits are returned, too; without, a runtime may find the next tokens in another way.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    wanted: Tensor
    sampling: SamplingInputs
    embeddings: Tensor | None = None
    inner: Inner = LOGITS_ONLY
    logits: bool = True

    @cached_property
    def runs(self) -> list[tuple[int, slice]]:
        """Each slot with the range of its tokens."""
        runs, begin = [], 0
        for slot, run in groupby(self.slots.tolist()):
            runs.append((slot, slice(begin, begin := begin + sum(1 for _ in run))))
        return runs

    @cached_property
    def longest(self) -> int:
        """The most tokens that a slot has in this step."""
        return max(tokens.stop - tokens.start for _, tokens in self.runs)

    @cached_property
    def sampled(self) -> Tensor:
        """int64 `(s,)`: which of the wanted logits are those of their slot's last token."""
        ends = torch.ones_like(self.slots, dtype=torch.bool)
        ends[:-1] = self.slots[1:] != self.slots[:-1]
        return ends[self.wanted].nonzero().squeeze(1)


class StepResult(NamedTuple):
    """What a step returns.

    Args:
        tokens: int32 `(s,)`, the next token of each slot whose last token is wanted.
        logits: float32 `(w, vocabulary)`, of the wanted tokens; `(0, vocabulary)` if the step has none.
        hidden_states: where asked for, float32 `(t, hidden)` before each layer, and `(t, word_embed_proj_dim)` after
            the last one, the final layernorm and `project_out`: what transformers' OPT returns under this name.
        attentions: where asked for, for each layer and each of the step's `runs`, float32 `(heads, n, used)`: the
            weights by which the n tokens of the run attend to the used positions of their slot.
    """

    tokens: Tensor
    logits: Tensor
    hidden_states: list[Tensor] | None = None
    attentions: list[list[Tensor]] | None = None


class Runtime(ABC):
    """A loaded export: weights, and a key/value cache of `batch_size` slots.

    Slots that a step does not name stay as they are.
    """

    # Whether several processes share the model, and make the same calls.
    is_shared = False
    # What of `inputs_embeds`, `output_hidden_states` and `output_attentions` it does not serve, and why.
    unserved: Mapping[str, str] = {}

    @property
    def prompt_chunk(self) -> int | None:
        """How many tokens of prompts a step takes well while other rows decode; None for whole prompts."""
        return None

    @abstractmethod
    def step(self, step: Step) -> StepResult:
        """Computes a step; the keys and values of its tokens are in the cache then."""

    @abstractmethod
    def copy(self, sources: Tensor, length: int) -> None:
        """Slot i takes over the first `length` positions of slot `sources[i]`; int `(batch_size,)`.

        What slot i has behind them is lost. No slot is both copied from and copied to, other than to itself.
        """

    def begin(self, *inputs: Tensor) -> None:  # noqa: B027 - most have nothing to do
        """Called at the beginning of a user's call that may draw random numbers.

        Where several processes share the model, all get the state of torch's default generator in the first.

        Raises:
            RuntimeError: if another process has other inputs.
        """

    def decide(self, decision: Tensor) -> Tensor:
        """A bool tensor: what the first process decided where several share the model, otherwise `decision`."""
        return decision

    @property
    def is_first(self) -> bool:
        """Whether this process writes files; where several share the model, one of them does."""
        return True


class Target(ABC):
    """Compiles and loads exports."""

    @abstractmethod
    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        """Compiles what runs the split checkpoint in `directory`, which gets a `compiled/` with a manifest.

        With `eager` only the manifest is written.
        """

    @abstractmethod
    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        """Loads an export directory; with `eager`, its graphs run uncompiled.

        Raises:
            CheckpointError: if files of it are missing or broken.
        """

    def once(self, neuron_config: OPTNeuronConfig, work: Callable[[], Result]) -> Result:
        """The result of `work`, such as an export; of the processes of a host that will load it, one does it.

        Raises:
            TargetError: if so many processes cannot run this export.
        """
        return work()
