"""Runs requests step by step, until none is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.utils import logging

from ..generation.engine import Engine
from ..generation.samplers import HostSampler
from ..model.sampling import SamplingInputs
from ..targets import Step, StepResult
from .prefixes import Prefixes
from .request import Request
from .scheduler import Scheduler
from .statistics import Counters, Statistics


logger = logging.get_logger(__name__)


class Batcher:
    """Requests on the slots of one engine. An error in one of them ends that one.

    Args:
        engine: computes the steps; its lock is held for each.
        prefixes: what its slots hold.
        chunk: tokens of prompts in a step while rows wait for their next token; None for what suits the runtime.
    """

    def __init__(self, engine: Engine, prefixes: Prefixes, chunk: int | None = None):
        self.engine = engine
        chunk = engine.runtime.prompt_chunk if chunk is None else chunk
        self.scheduler = Scheduler(engine, prefixes, chunk)
        self.counters = Counters(engine.slots.batch_size)
        # What a processor, criterion or listener of a request raised latest.
        self.failure: Exception | None = None
        self._cancelled: deque[Request] = deque()
        # Those that may end before they have a token.
        self._timed: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Takes a request, also one that has failed already; from any thread."""
        if request.is_over:
            self._tell_the_end(request)
            return
        if request.max_time is not None and not request.starts_late:
            self._timed[request.request_id] = request
        self.scheduler.add(request)
        logger.debug(f"Request {request.request_id} waits: {len(request.prompt)} tokens.")

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step; from any thread."""
        request.cancelled = True
        self._cancelled.append(request)

    def statistics(self) -> Statistics:
        return self.counters.statistics(len(self.scheduler), len(self.scheduler.running))

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Ends all requests if an error or an interrupt leaves the block."""
        try:
            yield
        except BaseException as error:
            self.abort(f"The call that it belongs to has ended ({type(error).__name__}: {error}).")
            raise

    def step(self) -> bool:
        """Computes a step; whether there was anything to do.

        Raises:
            Exception: what the runtime raises; no request can go on then.
        """
        with self.engine.lock:
            over = self._end_early()
            plan = self.scheduler.plan()
            if not plan:
                return over
            self.counters.step(len(self.scheduler.running), len(self.scheduler))
            sampled = [request for request, count in plan if count == request.pending]
            result = self.engine.runtime.step(_pack(plan, sampled))
            for request, count in plan:
                request.filled += count
        self._take(sampled, result)
        return True

    def abort(self, message: str) -> None:
        """Ends all requests, with an error."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(request, message)

    def _end_early(self) -> bool:
        """Ends requests that were cancelled, or whose time is over; whether there were any."""
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        for request in cancelled:
            if not request.is_over:
                self._end(request, "The request was cancelled.")
        late = self._late(list(self._timed.values()))
        for request in late:
            unanswered = f"max_time={request.max_time} seconds were over before its first token."
            self._end(request, None if request.generated else unanswered)
        return bool(cancelled or late)

    def _late(self, requests: list[Request]) -> list[Request]:
        """Those whose time is over; where processes share the model, as the first process's clock has it."""
        timed = [request for request in requests if request.max_time is not None]
        if not timed:
            return []
        now = time.perf_counter()
        decided = self.engine.runtime.decide(torch.tensor([request.is_late(now) for request in timed]))
        return [request for request, late in zip(timed, decided.tolist(), strict=True) if late]

    def _take(self, sampled: list[Request], result: StepResult) -> None:
        """Gives each request its next token."""
        now, chosen = time.perf_counter(), result.tokens.tolist()
        late = {id(request) for request in self._late(sampled)}
        for row, request in enumerate(sampled):
            try:
                token, rows = chosen[row], slice(row, row + 1)
                if isinstance(request.sampler, HostSampler):
                    given = request.input_ids(), result.tokens[rows], result.logits[rows]
                    token = int(request.sampler.next_tokens(*given))
                logprob = float(result.logits[row].log_softmax(-1)[token]) if request.wants_logprobs else None
                self.counters.token(request, now)
                request.append(token, logprob, now)
                if request.reaches_its_end() or id(request) in late:
                    self._end(request)
                elif request.listener is not None:
                    request.listener(request)
            except Exception as error:
                logger.debug(f"Request {request.request_id} failed.", exc_info=True)
                self.failure = error
                if not request.is_over:
                    self._end(request, f"{type(error).__name__}: {error}")

    def _end(self, request: Request, error: str | None = None) -> None:
        with self.engine.lock:
            self.scheduler.remove(request)
        self._timed.pop(request.request_id, None)
        request.status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        request.error, request.ended = error, time.perf_counter()
        self._tell_the_end(request)

    def _tell_the_end(self, request: Request) -> None:
        self.counters.end(request)
        logger.debug(
            f"Request {request.request_id} is over: {len(request.generated)} new tokens. {request.error or ''}"
        )
        if request.listener is not None:
            try:
                request.listener(request)
            except Exception:
                logger.warning(f"The callback of request {request.request_id} failed at its end.", exc_info=True)


def _pack(plan: list[tuple[Request, int]], sampled: list[Request]) -> Step:
    """The step that computes so many next tokens of each request, and samples what follows of some."""
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for request, count in plan:
        tokens += request.tokens(request.filled, count)
        slots += [request.slot] * count
        positions += range(request.filled, request.filled + count)
        if count == request.pending:
            wanted.append(len(tokens) - 1)
    return Step(
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(slots),
        torch.tensor(positions),
        torch.tensor(wanted, dtype=torch.int64),
        _sampling(sampled),
        logits=any(request.wants_logprobs or request.sampler.needs_logits for request in sampled),
    )


def _sampling(requests: list[Request]) -> SamplingInputs:
    """What samples the next tokens of some requests, a row for each."""
    if all(isinstance(one.sampler, HostSampler) or one.sampler.always_best for one in requests):
        return SamplingInputs.greedy(len(requests))
    rows = [request.sampler.inputs(1, request.width) for request in requests]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    return SamplingInputs(joined("params"), joined("uniforms"), joined("suppressed"))
