"""What every target does: compile an export's graphs, and run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from ..model.sampling import Selection


Result = TypeVar("Result")

# Where an export directory keeps its parts.
CHECKPOINT_DIR = "checkpoint"
COMPILED_DIR = "compiled"


class TargetError(RuntimeError):
    """What was asked for cannot be had on this host, or with this SDK; the message says why, and the way out."""


class Runtime(ABC):
    """A loaded export, its weights and key/value cache in place.

    `b` is the export's batch size; every call has a row for each slot. Idle rows (of length 0, or at position -1)
    leave their slot as it is, and what is returned for them means nothing.
    """

    @abstractmethod
    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Runs `context_encoding`: fills slots from position 0.

        Args:
            input_ids: int32 `(b, n)`, n a prompt bucket; each row's tokens first, anything behind them.
            lengths: int32 `(b,)`, how many tokens of each row count, 0 to n.
            selection: how the next tokens are selected.

        Returns:
            The next tokens, int32 `(b,)`, and the logits that they were selected from, float32 `(b, vocabulary)`.
        """

    @abstractmethod
    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Runs `token_generation`: one new token a row.

        Args:
            tokens: int32 `(b,)`.
            positions: int32 `(b,)`, where in its slot each token goes; the slot must be filled up to there.
            selection: how the next tokens are selected.

        Returns:
            As `prefill`.
        """

    @abstractmethod
    def extend(self, tokens: Tensor, positions: Tensor, selection: Selection, keep: int) -> tuple[Tensor, Tensor]:
        """Runs `speculation`: several new tokens a row.

        Args:
            tokens: int32 `(b, k)`, k at least 2. A row of fewer tokens repeats its last, with its position.
            positions: int32 `(b, k)`, where in its slot each token goes, ascending by one; the slot must be filled up
                to the first.
            selection: how the tokens that follow the last are selected.
            keep: how many logits are wanted, 1 to k.

        Returns:
            The tokens that follow the last, int32 `(b,)`, and the logits of the last `keep` tokens, float32
            `(b, keep, vocabulary)`.
        """

    @abstractmethod
    def copy(self, sources: Tensor, length: int) -> None:
        """Runs `cache_copy`: slot i takes over the first `length` positions of slot `sources[i]`; int `(b,)`."""

    def begin(self, *inputs: Tensor) -> None:  # noqa: B027 - most have nothing to do
        """To be called at the beginning of a call of the user's that may draw random numbers.

        Where several processes run the same calls, all get the state of torch's default generator in the first.

        Raises:
            RuntimeError: if another process has other inputs.
        """

    def decide(self, decision: Tensor) -> Tensor:
        """Where several processes run the same calls, what the first decided; else `decision` itself, bool."""
        return decision

    @property
    def is_first(self) -> bool:
        """Whether this process is to write files: where several run the same calls, one does."""
        return True


class Target(ABC):
    """Compiles and loads exports."""

    def prepare(self, eager: bool) -> None:  # noqa: B027 - most have nothing to do ahead
        """Does ahead, while a checkpoint is split, what of `compile` needs none. What fails fails again there."""

    @abstractmethod
    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        """Compiles what runs the split checkpoint in `directory`, which gets a `compiled/` with a manifest.

        With `eager` the manifest alone is written, and the export runs uncompiled.
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
