"""Where results go: to a request's own listener, or to whoever asks for them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

from transformers.generation.continuous_batching.requests import GenerationOutput

from ..generation.transformers_versions import generation_output
from .request import Request
from .statistics import Statistics


def output_of(request: Request) -> GenerationOutput:
    """What transformers' users get of a request, as it is now."""
    return generation_output(
        request_id=request.request_id,
        prompt_ids=list(request.prompt),
        generated_tokens=list(request.generated),
        logprobs=list(request.logprobs),
        error=request.error,
        status=request.status,
        created_time=request.created_time,
        lifespan=tuple(-1 if at is None else at for at in (request.started, request.ended)),
        timestamps=None if request.timestamps is None else list(request.timestamps),
    )


class BatchResults(dict[str, GenerationOutput]):
    """The results of `generate_batch`, by the ids of the requests, in the order of the prompts.

    Args:
        statistics: of the call.
    """

    statistics: Statistics


class Results:
    """Results that nobody has fetched yet, those of any request, or of one. For several threads."""

    def __init__(self) -> None:
        self._outputs: OrderedDict[str, deque[GenerationOutput]] = OrderedDict()
        self._arrived = threading.Condition()
        self._closed = False

    def put(self, output: GenerationOutput) -> None:
        with self._arrived:
            self._outputs.setdefault(output.request_id, deque()).append(output)
            self._arrived.notify_all()

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        """The next result, of one request or of any; None after `timeout` seconds, or if none will come any more."""
        until = None if timeout is None else time.perf_counter() + timeout
        with self._arrived:
            while True:
                name = next(iter(self._outputs), None) if request_id is None else request_id
                if name is not None and name in self._outputs:
                    outputs = self._outputs[name]
                    output = outputs.popleft()
                    if not outputs:
                        del self._outputs[name]
                    return output
                left = None if until is None else until - time.perf_counter()
                if self._closed or (left is not None and left <= 0):
                    return None
                self._arrived.wait(left)

    def open(self, is_open: bool) -> None:
        """Says whether more results will come; who waits in vain is woken."""
        with self._arrived:
            self._closed = not is_open
            self._arrived.notify_all()
