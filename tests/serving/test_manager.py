"""The manager: requests of any thread, results in any way, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from against_transformers import pair
from small_models import SHIPPED_MODEL
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.generation.continuous_batching import ContinuousBatchingManager as Theirs
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 6}
PROMPTS = [[5 + i, 40 - i, 9][: 1 + i % 3] * (1 + i) for i in range(9)]


def model(kind: str = "pre_norm"):
    return pair(kind, 1, 3)[0]


def expected(prompt: list[int], kind: str = "pre_norm", **options) -> list[int]:
    reference = pair(kind, 1, 3)[1]
    return reference.generate(torch.tensor([prompt]), **{**GREEDY, **options})[0, len(prompt) :].tolist()


class Waits(StoppingCriteria):
    """Holds a request until it is told to go on; it ends nothing."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.reached.set()
        assert self.go_on.wait(60)
        return torch.tensor([False])


def test_the_names_are_those_of_transformers():
    manager = model().init_continuous_batching()
    names = ("start", "is_running", "stop", "join", "add_request", "add_requests", "cancel_request", "get_result")
    for name in (*names, "request_id_iter", "__iter__"):
        assert hasattr(Theirs, name) and callable(getattr(manager, name))
    theirs = inspect.signature(GenerationMixin.generate_batch).parameters
    ours = inspect.signature(type(model()).generate_batch).parameters
    assert {"inputs", "generation_config", "progress_bar"} <= theirs.keys() & ours.keys()


def test_results_in_every_way():
    with model().init_continuous_batching(GenerationConfig(**GREEDY), streaming=True) as manager:
        ids = manager.add_requests(PROMPTS[:3])
        assert ids == ["req_0", "req_1", "req_2"]
        for name, prompt in zip(ids, PROMPTS[:3], strict=True):
            news = list(manager.request_id_iter(name))
            assert [len(news) for news in (one.generated_tokens for one in news)] == [1, 2, 3, 4, 5, 6]
            assert [one.status for one in news] == [RequestStatus.DECODING] * 5 + [RequestStatus.FINISHED]
            assert isinstance(news[-1], GenerationOutput)
            assert (news[-1].prompt_ids, news[-1].generated_tokens) == (prompt, expected(prompt))
        manager.add_request(PROMPTS[3], "mine", 3, streaming=False)
        (only,) = manager.request_id_iter("mine")
        assert only.generated_tokens == expected(PROMPTS[3], max_new_tokens=3)
        assert manager.get_result("mine", timeout=0.01) is None
        told = queue.SimpleQueue()
        manager.add_request(PROMPTS[4], callback=told.put)
        assert [len(told.get(timeout=60).generated_tokens) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        manager.add_requests(PROMPTS[5:7], streaming=False)
        manager.stop()
        assert {tuple(one.generated_tokens) for one in manager} == {tuple(expected(p)) for p in PROMPTS[5:7]}
    assert not manager.is_running()


def test_tokens_for_asyncio():
    async def listen(manager, prompt, enough):
        said = []
        async for token in manager.stream(prompt):
            said.append(token)
            if len(said) == enough:
                break
        return said

    async def both(manager):
        return await asyncio.gather(listen(manager, PROMPTS[0], 99), listen(manager, PROMPTS[8], 2))

    with model().init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
        whole, part = asyncio.run(both(manager))
        assert whole == expected(PROMPTS[0]) and part == expected(PROMPTS[8])[:2]
        with pytest.raises(RuntimeError, match="do not fit the sequence_length=64"):
            asyncio.run(listen(manager, [5] * 60, 99))


def test_threads_add_requests_while_others_generate():
    """Four threads and the manager on one model whose slots do for one of them only: all results right."""
    ours, kind = model("post_norm"), "post_norm"
    right = [expected(prompt, kind) for prompt in PROMPTS]
    with ours.init_continuous_batching(GenerationConfig(**GREEDY)) as manager:

        def calls(thread: int) -> None:
            for call in range(12):
                at = (thread + call) % len(PROMPTS)
                prompt = torch.tensor([PROMPTS[at]])
                if (thread + call) % 3 == 0:
                    out = ours.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist()
                elif (thread + call) % 3 == 1:
                    out = manager.get_result(manager.add_request(PROMPTS[at])).generated_tokens
                else:
                    results = ours.generate_batch([PROMPTS[at]] * 4, progress_bar=False, **GREEDY)
                    assert all(one.generated_tokens == right[at] for one in results.values())
                    out = results["req_0"].generated_tokens
                assert out == right[at]

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(calls, thread) for thread in range(4)]:
                done.result()


def test_a_request_in_the_middle_is_cancelled():
    waits = Waits()
    with model().init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
        manager.add_request(PROMPTS[0], "a", stopping_criteria=[waits])
        manager.add_request(PROMPTS[1], "b")
        assert waits.reached.wait(60)
        manager.cancel_request("a")
        manager.cancel_request("nobody")
        waits.go_on.set()
        cancelled = manager.get_result("a")
        assert (cancelled.status, cancelled.error) == (RequestStatus.FAILED, "The request was cancelled.")
        assert cancelled.generated_tokens == expected(PROMPTS[0])[: len(cancelled.generated_tokens)]
        assert manager.get_result("b").generated_tokens == expected(PROMPTS[1])
        assert manager.statistics().requests_cancelled == 1


def test_a_full_queue_blocks_then_raises():
    waits = Waits()
    with model().init_continuous_batching(GenerationConfig(**GREEDY), max_queue_size=2) as manager:
        manager.add_request(PROMPTS[0], stopping_criteria=[waits])
        assert waits.reached.wait(60)
        for prompt in PROMPTS[1:3]:
            manager.add_request(prompt)
        with pytest.raises(queue.Full, match="max_queue_size=2.*0.05 seconds"):
            manager.add_request(PROMPTS[3], timeout=0.05)
        threading.Timer(0.1, waits.go_on.set).start()
        manager.add_request(PROMPTS[3], timeout=60)
        manager.stop()
        assert len(list(manager)) == 4


def test_higher_priorities_go_first():
    waits, order = Waits(), []
    with model().init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
        for _ in range(3):
            manager.add_request(PROMPTS[0], stopping_criteria=[waits], callback=lambda _: None)
        assert waits.reached.wait(60)
        for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 1)):
            manager.add_request(PROMPTS[8], name, 1, priority=priority, callback=lambda o: order.append(o.request_id))
        waits.go_on.set()
        manager.stop()
    assert order == ["c", "d", "a", "b"]


def test_what_is_late_ends():
    with model().init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
        waits = Waits()
        manager.add_request(PROMPTS[0], "slow", stopping_criteria=[waits], max_time=0.2)
        assert waits.reached.wait(60)
        manager.add_request(PROMPTS[1], "never", max_time=0.001)
        time.sleep(0.3)
        waits.go_on.set()
        slow, never = manager.get_result("slow"), manager.get_result("never")
        assert slow.status is RequestStatus.FINISHED and 0 < len(slow.generated_tokens) < 6
        assert never.status is RequestStatus.FAILED and "max_time=0.001 seconds" in never.error


def test_stopping_at_once_and_starting_again():
    waits = Waits()
    manager = model().init_continuous_batching(GenerationConfig(**GREEDY))
    manager.add_request(PROMPTS[0], "early")  # before the start
    manager.start()
    assert manager.get_result("early").generated_tokens == expected(PROMPTS[0])
    manager.add_request(PROMPTS[0], "a", stopping_criteria=[waits])
    assert waits.reached.wait(60)
    with pytest.raises(RuntimeError, match="Another manager"):
        model().init_continuous_batching().start()
    with pytest.raises(ValueError, match="request_id='a' is in use"):
        manager.add_request(PROMPTS[1], "a")
    manager.stop(block=False, hard_stop=True)
    with pytest.raises(RuntimeError, match="is stopping"):
        manager.add_request(PROMPTS[1])
    waits.go_on.set()
    manager.join()
    assert manager.get_result().status is RequestStatus.FAILED and manager.get_result() is None
    with manager:
        assert manager.get_result(manager.add_request(PROMPTS[1])).generated_tokens == expected(PROMPTS[1])


def test_a_model_that_fails_ends_the_manager_with_its_message():
    ours = model()
    manager = ours.init_continuous_batching(GenerationConfig(**GREEDY))

    def fails(step):
        raise OSError("the device is gone")

    ours.runtime.step = fails
    try:
        with manager:
            manager.add_request(PROMPTS[0], "a")
            assert "OSError: the device is gone" in manager.get_result("a").error
            manager.join(60)
            with pytest.raises(RuntimeError, match="the device is gone"):
                manager.add_request(PROMPTS[1])
    finally:
        del ours.runtime.step
    with manager:
        assert manager.get_result(manager.add_request(PROMPTS[1])).generated_tokens == expected(PROMPTS[1])


def test_a_pinned_prefix_stays():
    ours, start = model(), [(11 * i) % 100 + 9 for i in range(25)]
    with ours.init_continuous_batching(GenerationConfig(**GREEDY)) as manager:
        manager.pin_prefix(start)
        for name in manager.add_requests(PROMPTS):
            manager.get_result(name)
        before = manager.statistics().prefix_tokens
        output = manager.get_result(manager.add_request([*start, 7, 8]))
        assert output.generated_tokens == expected([*start, 7, 8])
        assert manager.statistics().prefix_tokens == before + 25
        manager.pin_prefix(start[::-1])
        with pytest.raises(ValueError, match="No slot would be left.*batch_size=3"):
            manager.pin_prefix(PROMPTS[0])
        with pytest.raises(ValueError, match="do not fit|leaves no room"):
            manager.unpin_prefixes()
            manager.pin_prefix([5] * 64)
    with pytest.raises(RuntimeError, match="call start"):
        manager.pin_prefix(start)


def test_nothing_is_left_of_many_short_requests():
    ours = model()
    threads = threading.active_count()
    with ours.init_continuous_batching(
        GenerationConfig(**{**GREEDY, "max_new_tokens": 2}), max_queue_size=8
    ) as manager:
        objects = []
        for _ in range(3):
            for i in range(60):
                manager.add_request(PROMPTS[i % 9], callback=lambda output: None)
            while manager.statistics().requests_done % 60:
                time.sleep(0.005)
            gc.collect()
            objects.append(len(gc.get_objects()))
        assert objects[2] - objects[1] < 60  # less than one for each request
    assert threading.active_count() == threads


class Interrupts(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 4:
            raise KeyboardInterrupt
        return scores


def test_an_interrupt_ends_all_and_the_next_call_works():
    ours = model()
    with pytest.raises(KeyboardInterrupt):
        ours.generate_batch([[5, 6], [7, 8]] * 4, progress_bar=False, **GREEDY, logits_processor=[Interrupts()])
    results = ours.generate_batch(PROMPTS, progress_bar=False, **GREEDY)
    assert [one.generated_tokens for one in results.values()] == [expected(prompt) for prompt in PROMPTS]
    assert results.statistics.requests_running == results.statistics.requests_waiting == 0


LEFT_RUNNING = """
import sys
from optimum_opt_trn import NeuronOPTForCausalLM
model = NeuronOPTForCausalLM.from_pretrained(sys.argv[1], batch_size=2, sequence_length=256, amp="f32")
manager = model.init_continuous_batching()
manager.start()
manager.add_requests([[5, 6, 7], [8, 9]], max_new_tokens=250, eos_token_id=None, streaming=True)
next(iter(manager))
sys.exit(3)
"""


def test_a_process_ends_while_requests_run():
    """Its exit status is its own, and nothing is said of an abort."""
    command = [sys.executable, "-W", "ignore", "-c", LEFT_RUNNING, str(SHIPPED_MODEL)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3, ended.stderr[-500:]
