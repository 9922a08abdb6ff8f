"""One request: a prompt, how to go on from it, and what has become of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.continuous_batching.requests import RequestStatus

from ..generation.samplers import DeviceSampler, HostSampler
from ..generation.transformers_versions import generation_output


@dataclass(eq=False)
class Request:
    """A request; it owns the slot that it is in (a `SlotOwner`).

    Args:
        request_id: its name among all requests.
        prompt: tokens, at least one.
        sampler: samples its tokens, from random numbers of its own.
        most: how many new tokens it gets at most.
        ends: tokens that end it; they belong to the result.
        criteria: end it when they say so; called with `(1, width)` ids.
        shown: what processors and criteria see before the new tokens: the prompt with its padding.
        wants_logprobs: whether `logprobs` is filled.
        priority: requests with a higher one go first, those with the same in the order of their arrival.
        max_time: seconds from its arrival on, after which it ends; None for no limit.
        starts_late: whether it gets its first token even when `max_time` is over.
        pins: whether its slot keeps what it holds at the end.
        listener: called with the request after each new token, and after its end.
        timestamps: gets the time of each new token, if it is a list.
        arrival: when it arrived. All times are those of `time.perf_counter()`.
        created_time: the same by the clock that transformers' `GenerationOutput` has.
    """

    request_id: str
    prompt: list[int]
    sampler: DeviceSampler | HostSampler
    most: int
    ends: frozenset[int] = frozenset()
    criteria: Sequence[StoppingCriteria] = ()
    shown: list[int] | None = None
    wants_logprobs: bool = False
    priority: int = 0
    max_time: float | None = None
    starts_late: bool = False
    pins: bool = False
    listener: Callable[[Request], None] | None = None
    timestamps: list[float] | None = None
    arrival: float = field(default_factory=time.perf_counter)
    created_time: float = field(default_factory=lambda: generation_output(request_id="").created_time)

    generated: list[int] = field(default_factory=list)
    # The log-probability of each new token, before processors and temperature.
    logprobs: list[float] = field(default_factory=list)
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    cancelled: bool = False
    # When it got its slot, its latest token, and its end.
    started: float | None = None
    latest: float | None = None
    ended: float | None = None
    # The slot, none before it has one; how many of its tokens are in there; and what an earlier sequence left there.
    rows: list[int] = field(default_factory=list)
    filled: int = 0
    left_over: list[int] = field(default_factory=list)
    prefix_tokens: int = 0

    @property
    def slot(self) -> int:
        return self.rows[0]

    @property
    def length(self) -> int:
        """Tokens of prompt and result so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; the next token follows from the last of them."""
        return self.length - self.filled

    def tokens(self, start: int, count: int) -> list[int]:
        """`count` tokens of prompt and result, from `start` on."""
        split = len(self.prompt)
        if start >= split:
            return self.generated[start - split : start - split + count]
        return (self.prompt + self.generated)[start : start + count] if self.generated else self.prompt[start:][:count]

    @property
    def cached(self) -> list[int]:
        """The tokens that are in its slot: its own, or those of an earlier sequence, still untouched."""
        return self.tokens(0, self.filled) if self.filled else self.left_over

    @property
    def width(self) -> int:
        """Columns that processors and criteria see."""
        return len(self.prompt if self.shown is None else self.shown) + len(self.generated)

    def input_ids(self) -> Tensor:
        """What they see, int64 `(1, width)`."""
        return torch.tensor([(self.prompt if self.shown is None else self.shown) + self.generated])

    def is_late(self, now: float) -> bool:
        """Whether its time is over at `now`."""
        return self.max_time is not None and now - self.arrival > self.max_time

    @property
    def is_over(self) -> bool:
        return self.status in (RequestStatus.FINISHED, RequestStatus.FAILED)

    def leave_slot(self) -> None:
        """Forgets its slot, whose contents another call has overwritten; its tokens are to be computed again."""
        self.rows, self.filled, self.left_over = [], 0, []

    def append(self, token: int, logprob: float | None, now: float) -> None:
        """Takes its next token."""
        self.generated.append(token)
        self.latest = now
        if self.timestamps is not None:
            self.timestamps.append(now)
        if logprob is not None:
            self.logprobs.append(logprob)
        self.status = RequestStatus.DECODING

    def reaches_its_end(self) -> bool:
        """Whether the newest token was the last one."""
        if self.generated[-1] in self.ends or len(self.generated) >= self.most:
            return True
        if not self.criteria:
            return False
        ids = self.input_ids()
        return any(bool(torch.as_tensor(one(ids, None)).all()) for one in self.criteria)
