"""What a contender's class does, in its worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Runner(ABC):
    """A contender: converts a checkpoint, loads it, runs prompts and greedy steps.

    Args:
        options: those of its entry in `peers/__init__.py`.
        threads: how many it may use; the worker's environment says the same (`OMP_NUM_THREADS`).
    """

    def __init__(self, options: dict[str, Any], threads: int):
        self.options, self.threads = options, threads

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that matter."""

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        """Writes what `load` wants to `directory`, for so many rows of at most `length` tokens if that matters."""
        raise NotImplementedError(f"{type(self).__module__} loads the checkpoint as it is.")

    @abstractmethod
    def load(self, directory: str) -> None:
        """Loads the model."""

    @abstractmethod
    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        """Runs prompts of equal length from nothing; the next token of each row.

        `room` is how many tokens a row will have at most, with those of `decode`.
        """

    @abstractmethod
    def decode(self, steps: int) -> list[list[int]]:
        """Goes on greedily by so many tokens, however they end; those of each row."""
