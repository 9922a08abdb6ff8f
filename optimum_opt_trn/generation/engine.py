"""The engine: the slots of a runtime, their owners, and the loop of steps. It knows nothing of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..model.sampling import SamplingInputs
from ..targets import LOGITS_ONLY, Inner, Runtime, StepResult
from .fork import survive_fork
from .inputs import pack
from .slots import SlotOwner, Slots
from .turns import TurnLock


class Sequences(SlotOwner, Protocol):
    """Rows that are computed together, and how much of each is in the cache.

    Args:
        rows: empty before the first step.
        lengths: int64 `(rows,)`, the filled positions of each row's slot.
    """

    @property
    def lengths(self) -> Tensor: ...

    def append(self, mask: Tensor) -> None:
        """Notes that new columns, bool `(rows, n)`, are in the cache."""


# Takes a step's result; returns the next token of each row, integers `(rows,)`, and how those that follow them are
# sampled; None ends the loop.
Advance = Callable[[StepResult], tuple[Tensor, SamplingInputs] | None]


class Engine:
    """Computes steps on a runtime, for one caller at a time.

    Args:
        runtime: computes the steps.
        batch_size: how many slots it has.
        sequence_length: positions of a slot.
    """

    def __init__(self, runtime: Runtime, batch_size: int, sequence_length: int):
        self.runtime = runtime
        self.sequence_length = sequence_length
        self.slots = Slots(batch_size)
        # Held for a whole call of the user's, since calls may evict one another's slots. Reentrant, since
        # transformers' loops call forward() within generate(). Who keeps evicted rows' tokens, and encodes them
        # again, may hold it for a step at a time.
        self.lock = TurnLock()
        # Whether a generate() of this thread may begin now.
        self._may_generate = True
        survive_fork(self)

    def after_fork(self) -> None:
        """Makes the engine usable in a fork of the process that made it; called there."""
        if self.lock.after_fork():
            # Another thread was in a call, which goes on only in the parent.
            self.slots.free(range(self.slots.batch_size))
            self._may_generate = True

    @contextmanager
    def generating(self, assists_itself: bool) -> Iterator[None]:
        """Serves one call of `generate()`; calls of other threads wait.

        Args:
            assists_itself: whether this call makes further calls, as assisted generation does with its assistant.

        Raises:
            RuntimeError: if this thread is within another call, which makes no further ones.
        """
        with self.lock:
            if not self._may_generate:
                raise RuntimeError(
                    "generate() was called within a generate() of the same model (by a logits processor, stopping "
                    "criterion or streamer), which needs the slots itself: call it before or after, or load a second "
                    "model."
                )
            before, self._may_generate = self._may_generate, assists_itself
            try:
                yield
            finally:
                self._may_generate = before

    def step(
        self,
        sequences: Sequences,
        input_ids: Tensor,
        mask: Tensor,
        keep: int,
        sampling: SamplingInputs | None = None,
        embeddings: Tensor | None = None,
        inner: Inner = LOGITS_ONLY,
        logits: bool = True,
    ) -> StepResult:
        """Computes new columns of each row, and appends them. Inputs are not checked.

        Args:
            sequences: get slots, if nothing of them is in the cache yet.
            input_ids, mask: integers and bool `(rows, width)`. A row without tokens stays as it is. Ids are -1 for
                tokens that are given by their embeddings.
            keep: of how many of each row's last tokens logits are wanted; 0 for all.
            sampling: how the next tokens are sampled, `rows` of them; by default greedily.
            embeddings: floating point `(rows, width, word_embed_proj_dim)`, read where ids are -1.
            inner: what else is returned.
            logits: whether logits are returned.

        Returns:
            The next tokens of the rows that have tokens, and the wanted logits, row by row; and what else was asked
            for.

        Raises:
            ValueError: if the sequences have lost their slots, or if there are fewer slots than rows.
        """
        if not self.slots.owns(sequences):
            self.check(sequences)
            sequences.rows = self.slots.allocate(len(input_ids))
        self.slots.assign(sequences)
        sampling = sampling or SamplingInputs.greedy(len(input_ids))
        rows, lengths = sequences.rows, sequences.lengths
        result = self.runtime.step(pack(input_ids, mask, rows, lengths, keep, sampling, embeddings, inner, logits))
        sequences.append(mask)
        return result

    def check(self, sequences: Sequences) -> None:
        """Raises ValueError if another call has evicted the sequences, and what was computed of them is lost."""
        if bool(sequences.lengths.any()) and not self.slots.owns(sequences):
            raise ValueError(
                f"past_key_values has lost its slots to another call, since there are only {self.slots.batch_size} "
                "(the batch_size that the model was exported for): leave it out and encode the prompt again, or "
                "export with a larger batch_size."
            )

    def run(
        self,
        sequences: Sequences,
        input_ids: Tensor,
        mask: Tensor,
        sampling: SamplingInputs,
        advance: Advance,
        embeddings: Tensor | None = None,
        inner: Inner = LOGITS_ONLY,
        logits: bool = True,
    ) -> None:
        """Steps until `advance` ends the loop: first `input_ids`, then one token of each row at a time.

        Args: as of `step`; every row has tokens.
        """
        one = torch.ones(len(input_ids), 1, dtype=torch.bool)
        while True:
            following = advance(self.step(sequences, input_ids, mask, 1, sampling, embeddings, inner, logits))
            if following is None:
                return
            (tokens, sampling), mask, embeddings = following, one, None
            input_ids = tokens[:, None]

    def copy(self, copies: dict[int, int], length: int) -> None:
        """Copies the first `length` positions of slots, target -> source; no target is another's source."""
        assert copies.keys().isdisjoint(copies.values())
        if copies and length:
            sources = torch.arange(self.slots.batch_size, dtype=torch.int32)
            sources[list(copies)] = torch.tensor(list(copies.values()), dtype=torch.int32)
            self.runtime.copy(sources, length)
