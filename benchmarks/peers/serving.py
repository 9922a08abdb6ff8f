"""What a contender's class does that answers many requests, in its worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Server(ABC):
    """Loads a model, and answers requests: greedily, each with as many tokens as it asks for, whatever they are.

    Args:
        options: those of its entry in `traffic/contenders.py`.
        threads: how many it may use; the worker's environment says the same (`OMP_NUM_THREADS`).
    """

    def __init__(self, options: dict[str, Any], threads: int):
        self.options, self.threads = options, threads

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that matter."""

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        """Writes what `load` wants to `directory`, for rows of at most `length` tokens."""
        raise NotImplementedError(f"{type(self).__module__} loads the checkpoint as it is.")

    @abstractmethod
    def load(self, directory: str, batch_size: int, length: int) -> None:
        """Loads the model, to run at most `batch_size` requests at once."""

    @abstractmethod
    def serve(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        """Answers all requests, which are there from the beginning; how many new tokens each got."""
