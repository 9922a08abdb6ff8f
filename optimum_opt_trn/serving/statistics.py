"""What has been asked, and how fast it was answered."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from transformers.generation.continuous_batching.requests import RequestStatus

from .request import Request


# Times that medians are taken of: the latest.
_KEPT = 4096


@dataclass(frozen=True)
class Times:
    """Of the latest 4096, in seconds; None if there are none.

    Args:
        median, highest: of them.
    """

    median: float | None
    highest: float | None

    @classmethod
    def of(cls, times: deque[float]) -> Times:
        return cls(statistics.median(times), max(times)) if times else cls(None, None)


@dataclass(frozen=True)
class Statistics:
    """What a manager or a call of `generate_batch` has done so far.

    Args:
        requests_waiting, requests_running: now.
        requests_done, requests_failed, requests_cancelled: so far.
        tokens_in: tokens of the prompts that got a slot.
        tokens_out: new tokens.
        prefix_hits: prompts whose beginning was copied.
        prefix_tokens: tokens that were copied instead of computed.
        steps: how often the model ran.
        slots: how many there are.
        slots_used: the mean share of them that had a request in a step, from 0 to 1.
        slots_used_with_queue: the same of the steps while requests waited.
        time_to_first_token: from a request's arrival.
        time_between_tokens: of a request.
    """

    requests_waiting: int
    requests_running: int
    requests_done: int
    requests_failed: int
    requests_cancelled: int
    tokens_in: int
    tokens_out: int
    prefix_hits: int
    prefix_tokens: int
    steps: int
    slots: int
    slots_used: float
    slots_used_with_queue: float
    time_to_first_token: Times
    time_between_tokens: Times


@dataclass
class Counters:
    """What `Statistics` are made from."""

    slots: int
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    steps: int = 0
    busy: int = 0
    steps_with_queue: int = 0
    busy_with_queue: int = 0
    first: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def step(self, running: int, waiting: int) -> None:
        """A step with so many requests in slots, and so many without."""
        self.steps += 1
        self.busy += running
        if waiting:
            self.steps_with_queue += 1
            self.busy_with_queue += running

    def token(self, request: Request, now: float) -> None:
        """A new token of a request, before it is taken."""
        self.tokens_out += 1
        if request.latest is None:
            self.first.append(now - request.arrival)
            self.tokens_in += len(request.prompt)
            self.prefix_tokens += request.prefix_tokens
            self.prefix_hits += request.prefix_tokens > 0
        else:
            self.between.append(now - request.latest)

    def end(self, request: Request) -> None:
        """A request that is over."""
        if request.status is RequestStatus.FINISHED:
            self.done += 1
        elif request.cancelled:
            self.cancelled += 1
        else:
            self.failed += 1

    def statistics(self, waiting: int, running: int) -> Statistics:
        """With so many requests now."""
        return Statistics(
            requests_waiting=waiting,
            requests_running=running,
            requests_done=self.done,
            requests_failed=self.failed,
            requests_cancelled=self.cancelled,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            prefix_hits=self.prefix_hits,
            prefix_tokens=self.prefix_tokens,
            steps=self.steps,
            slots=self.slots,
            slots_used=_share(self.busy, self.slots * self.steps),
            slots_used_with_queue=_share(self.busy_with_queue, self.slots * self.steps_with_queue),
            time_to_first_token=Times.of(self.first.copy()),
            time_between_tokens=Times.of(self.between.copy()),
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
