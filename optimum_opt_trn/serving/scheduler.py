"""Which requests have slots, and what the next step computes of each."""

from __future__ import annotations

import heapq
import itertools
import threading
import time

from transformers.generation.continuous_batching.requests import RequestStatus

from ..generation.engine import Engine
from .prefixes import SHORTEST_PREFIX, Prefixes, common, longest
from .request import Request


# Tokens of prompts in a step, where no row waits for its next token.
IDLE_CHUNK = 512


class Scheduler:
    """Gives slots to requests, and a step's room to their tokens.

    Every row that decodes is in every step. What room a step has for prompts goes to the request that has had its slot
    for longest. A freed slot goes to the next request at once.

    Args:
        engine: whose slots they are.
        prefixes: what its slots hold.
        chunk: tokens of prompts in a step, while rows wait for their next token; None to take prompts whole, and then
            one in a step.
    """

    def __init__(self, engine: Engine, prefixes: Prefixes, chunk: int | None):
        self.engine, self.prefixes, self.chunk = engine, prefixes, chunk
        # In the order in which they got their slots.
        self.running: list[Request] = []
        self._waiting: list[tuple[int, int, Request]] = []
        self._arrivals = itertools.count()
        self._order: dict[str, int] = {}
        # Requests arrive from any thread.
        self._lock = threading.Lock()

    @property
    def waiting(self) -> list[Request]:
        with self._lock:
            return [request for *_, request in self._waiting]

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """A request that waits for a slot; one that had a slot waits in the place of its arrival."""
        with self._lock:
            order = self._order.setdefault(request.request_id, next(self._arrivals))
            heapq.heappush(self._waiting, (-request.priority, order, request))

    def remove(self, request: Request) -> None:
        """Takes a request away, and notes what stays in its slot."""
        self._order.pop(request.request_id, None)
        if request in self.running:
            self.running.remove(request)
            if self.engine.slots.owns(request):
                self.prefixes.hold(request.slot, request.cached, request.pins)
        else:
            with self._lock:
                self._waiting = [entry for entry in self._waiting if entry[2] is not request]
                heapq.heapify(self._waiting)

    def plan(self) -> list[tuple[Request, int]]:
        """The next step: requests, and how many of their next tokens it computes. Empty if there is nothing to do.

        Copies the beginnings that other slots hold. The engine's lock is held.
        """
        self._give_back_lost_slots()
        self._fill_slots()
        plan = [(request, 1) for request in self.running if request.pending == 1]
        room = (self.chunk or 1) if plan else max(IDLE_CHUNK, self.chunk or 0)
        for request in self.running:
            if request.pending == 1 or room <= 0:
                continue
            if request.filled == 0 and not self._copy_beginning(request):
                continue
            count = request.pending if self.chunk is None else min(request.pending, room)
            plan.append((request, count))
            room -= count
        return plan

    def _give_back_lost_slots(self) -> None:
        """Requests whose slots other calls have taken wait again; what they said stays."""
        lost = [request for request in self.running if not self.engine.slots.owns(request)]
        for request in lost:
            self.running.remove(request)
            request.leave_slot()
            self.add(request)

    def _fill_slots(self) -> None:
        while self._waiting:
            with self._lock:
                request = self._waiting[0][2]
                slot = self.prefixes.choose_slot(request.prompt + request.generated, self.running)
                if slot is None:
                    return
                heapq.heappop(self._waiting)
            request.left_over = self.prefixes.forget(slot)
            request.rows, request.filled = [slot], 0
            self.engine.slots.assign(request)
            self.running.append(request)
            if request.started is None:
                request.started, request.status = time.perf_counter(), RequestStatus.PREFILLING

    def _copy_beginning(self, request: Request) -> bool:
        """Takes over what some slot holds of the tokens of a request of which nothing is computed; never the last one.

        Returns:
            False if a request before it is about to compute more of them: then it is worth waiting.
        """
        tokens = (request.prompt + request.generated)[:-1]
        # Its own slot first, which needs no copy.
        others = [other for other in self.running if other is not request]
        length, source = longest(tokens, [request, *others, *self.prefixes.held()])
        for other in self.running[: self.running.index(request)]:
            if other.pending > 1 and common(tokens, other.prompt) >= length + SHORTEST_PREFIX:
                return False
        request.left_over = []
        if source is not None:
            if source != request.slot:
                self.engine.copy({request.slot: source}, length)
                self.prefixes.touch(source)
            request.filled = request.prefix_tokens = length
        return True
