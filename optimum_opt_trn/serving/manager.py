"""The manager: requests from any thread at any time, answered by a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from ..generation.engine import Engine
from ..generation.generate import OPTGenerationMixin
from .batcher import Batcher
from .options import RequestMaker
from .prefixes import Prefixes
from .request import Request
from .results import Results, output_of
from .statistics import Statistics


logger = logging.get_logger(__name__)

# Seconds that a request waits for a place in a full queue, as in transformers.
PATIENCE = 10.0

# The manager that serves an engine.
_running: weakref.WeakKeyDictionary[Engine, ContinuousBatchingManager] = weakref.WeakKeyDictionary()

Callback = Callable[[GenerationOutput], Any]


class ContinuousBatchingManager:
    """Answers requests on the slots of one model; has transformers' names. `init_continuous_batching` makes it.

    As a context manager it starts and stops itself.

    Args:
        model: computes the tokens.
        generation_config: options of every request; by default the model's.
        prefixes: what the model's slots hold.
        max_queue_size: how many requests may wait; 0 for any number.
        streaming: whether there is a result after every token, not only at the end.
    """

    def __init__(
        self,
        model: OPTGenerationMixin,
        generation_config: GenerationConfig | None,
        prefixes: Prefixes,
        max_queue_size: int = 0,
        streaming: bool = False,
    ):
        if max_queue_size < 0:
            raise ValueError(f"max_queue_size={max_queue_size} must be 0, for any number, or more.")
        self.model, self.prefixes = model, prefixes
        self.max_queue_size, self.streaming = max_queue_size, streaming
        self._maker = RequestMaker(model, generation_config)
        self._batcher = Batcher(model.engine, prefixes, self._maker.chunk)
        self._results = Results()
        self._open: dict[str, Request] = {}
        self._numbers = itertools.count()
        # Guards what is above and below, and wakes the thread, and those that wait for a place in the queue.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._error: str | None = None

    def __enter__(self) -> ContinuousBatchingManager:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(hard_stop=error is not None)

    def start(self) -> None:
        """Starts the thread; requests may have been added before.

        Raises:
            RuntimeError: if another manager of the model is running.
        """
        if self.is_running():
            logger.warning("The manager is running already.")
            return
        other = _running.get(self.model.engine)
        if other is not None and other.is_running():
            raise RuntimeError("Another manager of this model is running: add requests to that one, or stop it first.")
        _running[self.model.engine] = self
        self._stopping, self._error = False, None
        self._results.open(True)
        self._thread = threading.Thread(target=self._loop, name="continuous-batching", daemon=True)
        atexit.register(self._end_with_the_process)  # first: the thread takes it back at its end
        self._thread.start()

    def is_running(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        """Takes no more requests; the thread ends when those that there are have their results.

        Args:
            block: whether to wait for that, `timeout` seconds at most.
            hard_stop: whether requests end at once, as failed.
        """
        with self._changed:
            self._stopping = True
            if hard_stop:
                for request in self._open.values():
                    self._batcher.cancel(request)
            self._changed.notify_all()
        if block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread to end; it does so after `stop`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning(f"The manager has not ended within {timeout} seconds.")

    def add_request(
        self,
        input_ids: Any,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool | None = None,
        callback: Callback | None = None,
        timeout: float | None = PATIENCE,
        **options: Any,
    ) -> str:
        """Adds a request; its id.

        A prompt that does not fit, and an error later, ends the request: its result has the status FAILED and the
        message as `error`.

        Args:
            input_ids: the prompt's tokens.
            request_id: by default `req_0`, `req_1`, …
            max_new_tokens: as in `generate()`.
            streaming: whether there is a result after every token; by default as the manager was made.
            callback: called with those results, in the manager's thread; they are not to be fetched then.
            timeout: seconds to wait if the queue is full; None for any time.
            options: any of GenerationConfig that concern one row, and `seed`, `priority`, `logprobs`, `n`,
                `logits_processor`, `stopping_criteria`, `tokenizer`, `record_timestamps`; see docs/serving.md.

        Raises:
            TypeError: for an unknown option, naming the nearest; for text as a prompt.
            ValueError: for values that mean nothing, and an id that is in use.
            NotImplementedError: for what requests do not do, such as beams.
            queue.Full: if the queue stays full.
            RuntimeError: if the manager was stopped.
        """
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        request_id = f"req_{next(self._numbers)}" if request_id is None else request_id
        self._submit(
            self._maker.make(request_id, input_ids, options),
            self._listener(self.streaming if streaming is None else streaming, callback),
            timeout,
        )
        return request_id

    def add_requests(self, inputs: Iterable[Any], **options: Any) -> list[str]:
        """Adds a request for each prompt, all with the same options of `add_request`; their ids."""
        return [self.add_request(input_ids, **options) for input_ids in inputs]

    def cancel_request(self, request_id: str) -> None:
        """Ends a request; its result has the status FAILED, and the tokens that it had. Does nothing if it is over."""
        with self._changed:
            for name, request in self._open.items():
                if name == request_id or name.startswith(f"{request_id}__child#"):
                    self._batcher.cancel(request)
            self._changed.notify_all()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result, of one request or of any; None after `timeout` seconds, or if there will be none.

        Results are given once.
        """
        return self._results.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the manager has stopped and none is left."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """The results of one request as they come, the last one included."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.status in (RequestStatus.FINISHED, RequestStatus.FAILED):
                return

    async def stream(self, input_ids: Any, **options: Any) -> AsyncIterator[int]:
        """The new tokens of one prompt as they come, for asyncio. Who leaves the loop early cancels the request.

        Args: as of `add_request`.

        Raises:
            RuntimeError: if the request fails, with its message; and what `add_request` raises.
        """
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue[GenerationOutput]()

        def arrived(output: GenerationOutput) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        # In a thread, since it may wait for a place in the queue.
        request_id = await asyncio.to_thread(self.add_request, input_ids, streaming=True, callback=arrived, **options)
        given = 0
        try:
            while True:
                output = await outputs.get()
                for token in output.generated_tokens[given:]:
                    given += 1
                    yield token
                if output.status is RequestStatus.FAILED:
                    raise RuntimeError(f"Request {request_id} failed: {output.error}")
                if output.status is RequestStatus.FINISHED:
                    return
        finally:
            self.cancel_request(request_id)

    def pin_prefix(self, input_ids: Any) -> None:
        """Encodes the beginning of prompts to come, and keeps it in a slot of its own until `unpin_prefixes`.

        Waits until it is encoded. The manager is to be running.

        Raises:
            ValueError: if it does not fit, or if no slot would be left for requests.
            RuntimeError: if the manager is not running.
        """
        if not self.is_running():
            raise RuntimeError("pin_prefix() needs the manager to be running: call start() first.")
        slots = self.model.engine.slots.batch_size
        if len(self.prefixes.pinned()) + 1 >= slots:
            raise ValueError(
                f"No slot would be left for requests: the model was exported for batch_size={slots}. Call "
                "unpin_prefixes(), or export with a larger batch_size."
            )
        outputs: queue.SimpleQueue[GenerationOutput] = queue.SimpleQueue()
        options = {"max_new_tokens": 1, "do_sample": False, "n": 1}
        (request,) = self._maker.make(f"prefix_{next(self._numbers)}", input_ids, options)
        request.pins = True
        self._submit([request], self._listener(False, outputs.put), None)
        error = outputs.get().error
        if error is not None:
            raise ValueError(error)

    def unpin_prefixes(self) -> None:
        """Lets requests overwrite what `pin_prefix` keeps."""
        with self.model.engine.lock:
            self.prefixes.unpin()

    def statistics(self) -> Statistics:
        """What was asked and answered since the manager was made."""
        return self._batcher.statistics()

    def _submit(self, requests: list[Request], listener: Callable[[Request], None], timeout: float | None) -> None:
        """Adds the requests for one prompt."""
        with self._changed:
            self._wait_for_room(len(requests), timeout)
            if self._error is not None or (self._stopping and self.is_running()):
                raise RuntimeError(
                    self._error or "The manager is stopping and takes no more requests: start it again."
                )
            for request in requests:
                if request.request_id in self._open:
                    raise ValueError(f"request_id={request.request_id!r} is in use: choose another, or leave it out.")
            for request in requests:
                request.listener = listener
                if not request.is_over:
                    self._open[request.request_id] = request
                    self._batcher.add(request)
            self._changed.notify_all()
        for request in requests:
            if request.is_over and request.request_id not in self._open:
                self._batcher.add(request)

    def _listener(self, streaming: bool, callback: Callback | None) -> Callable[[Request], None]:
        """What becomes of a request's news; it must not keep the request alive."""

        def listener(request: Request) -> None:
            if request.is_over:
                with self._changed:
                    self._open.pop(request.request_id, None)
                    self._changed.notify_all()
            if streaming or request.is_over:
                (callback or self._results.put)(output_of(request))

        return listener

    def _wait_for_room(self, count: int, timeout: float | None) -> None:
        """Waits until the queue has room for so many requests; an empty queue takes any number."""
        if not self.max_queue_size:
            return

        def has_room() -> bool:
            waiting = len(self._batcher.scheduler)
            return waiting == 0 or waiting + count <= self.max_queue_size

        if not self._changed.wait_for(has_room, timeout):
            raise queue.Full(
                f"The queue of max_queue_size={self.max_queue_size} requests has been full for {timeout} seconds: "
                "wait for results before you add more, or allow a longer timeout or queue."
            )

    def _end_with_the_process(self) -> None:
        """Ends the thread before the interpreter would: that aborts the process if the thread is in torch."""
        self.stop(hard_stop=True)

    def _loop(self) -> None:
        try:
            while True:
                worked = self._batcher.step()
                with self._changed:
                    if self.max_queue_size:
                        self._changed.notify_all()
                    if not worked and not self._open:
                        if self._stopping:
                            return
                        self._changed.wait_for(lambda: self._open or self._stopping)
        except Exception as error:
            logger.error(f"The manager has ended: {error}", exc_info=True)
            with self._changed:
                self._error = f"The manager has ended, since the model failed ({type(error).__name__}: {error})."
            self._batcher.abort(self._error)
        finally:
            self._results.open(False)
            _running.pop(self.model.engine, None)
            atexit.unregister(self._end_with_the_process)
