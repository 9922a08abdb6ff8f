"""What every target does: compile an export's graphs, and run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from ..sampling import Selection


# Where an export directory keeps its parts.
CHECKPOINT_DIR = "checkpoint"
COMPILED_DIR = "compiled"


class Runtime(ABC):
    """A loaded export, its weights and key/value cache in place. `b` is the export's batch size, always whole."""

    @abstractmethod
    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Runs `context_encoding`: fills every slot from position 0.

        Args:
            input_ids: int32 `(b, n)`, n a prompt bucket; each row's tokens first, anything behind them.
            lengths: int32 `(b,)`, how many tokens of each row count, 1 to n.
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
    def prompt_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of every position, float32 `(b, n, vocabulary)`, of int32 prompts `(b, n)`; overwrites all slots."""


class Target(ABC):
    """Compiles and loads exports."""

    @abstractmethod
    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        """Compiles the graphs for the split checkpoint in `directory`, which gets a `compiled/` with a manifest.

        With `eager` the manifest alone is written, and the export runs uncompiled.
        """

    @abstractmethod
    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        """Loads an export directory; with `eager`, its graphs run uncompiled.

        Raises:
            CheckpointError: if files of it are missing or broken.
        """
