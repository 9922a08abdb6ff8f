"""Each request gets the tokens that transformers gives for its prompt. Other requests and their order change none."""

from __future__ import annotations

import functools

import pytest
import torch
from against_transformers import pair
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, set_seed
from transformers.generation.continuous_batching.requests import RequestStatus

from optimum_opt_trn.serving.batcher import Batcher
from optimum_opt_trn.serving.options import RequestMaker
from optimum_opt_trn.serving.prefixes import Prefixes


GREEDY = {"do_sample": False, "eos_token_id": [7, 20, 33, 46], "pad_token_id": 1}
LIMIT = 64


@functools.cache
def alone(kind: str, prompt: tuple[int, ...], new: int) -> list[int]:
    """transformers' new tokens."""
    _, reference = pair(kind, 1, 3)
    out = reference.generate(torch.tensor([prompt]), **GREEDY, max_new_tokens=new)
    return out[0, len(prompt) :].tolist()


class Fails(LogitsProcessor):
    """Raises when the row has so many tokens."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.width:
            raise ArithmeticError("no luck")
        return scores


# Beginnings that prompts share, long enough to be copied.
STARTS = [[(7 * i + 3 * j) % 120 + 5 for j in range(30)] for i in range(2)]
prompts = st.one_of(
    st.lists(st.integers(4, 127), min_size=1, max_size=40),
    st.builds(
        lambda start, cut, end: start[:cut] + end,
        st.sampled_from(STARTS),
        st.integers(16, 30),
        st.lists(st.integers(4, 127), max_size=10),
    ),
)
arrivals = st.lists(
    st.tuples(
        prompts,
        st.integers(1, 12),  # new tokens
        st.integers(0, 6),  # steps before the next one arrives
        st.sampled_from(["stays", "stays", "stays", "is cancelled", "fails", "too long"]),
        st.integers(0, 2),  # priority
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    arrivals,
    st.sampled_from([("pre_norm", 1), ("pre_norm", 2), ("post_norm", 1), ("galactica", 2)]),
    st.sampled_from([None, 1, 5, 16]),
    st.booleans(),
)
def test_neighbours_and_order_change_nothing(arrivals, model, chunk, keeps_prefixes):
    """Requests that come, go, fail and share beginnings, while other calls take slots away now and then."""
    kind, tp_degree = model
    ours, _ = pair(kind, tp_degree, 3)
    prefixes = ours.prefixes if keeps_prefixes else Prefixes(ours.engine.slots)
    batcher = Batcher(ours.engine, prefixes, chunk)
    maker = RequestMaker(ours, None)
    expected, requests = [], []
    for i, (prompt, new, steps, fate, priority) in enumerate(arrivals):
        new = min(new, LIMIT - len(prompt))
        options = {**GREEDY, "max_new_tokens": new + LIMIT * (fate == "too long"), "priority": priority}
        if fate == "fails":
            options["logits_processor"] = [Fails(len(prompt) + 2)]
        requests += maker.make(f"r{i}", prompt, options)
        expected.append(alone(kind, tuple(prompt), new))
        batcher.add(requests[-1])
        for _ in range(steps):
            batcher.step()
        if fate == "is cancelled":
            batcher.cancel(requests[-1])
        if steps == 6:
            ours(torch.tensor([prompt, prompt]))  # takes two slots
    while batcher.step():
        pass
    assert batcher.scheduler.running == [] and len(batcher.scheduler) == 0
    for request, tokens, (*_, fate, _) in zip(requests, expected, arrivals, strict=True):
        assert request.is_over
        if fate == "stays":
            assert (request.status, request.error) == (RequestStatus.FINISHED, None)
            assert request.generated == tokens
        elif fate == "is cancelled":
            assert request.generated == tokens[: len(request.generated)]
        elif fate == "fails" and len(tokens) > 2:
            assert request.error == "ArithmeticError: no luck" and request.generated == tokens[:2]
        elif fate == "too long":
            assert "do not fit the sequence_length=64" in request.error
    statistics = batcher.statistics()
    assert statistics.tokens_out == sum(len(request.generated) for request in requests)
    assert statistics.requests_done == sum(request.status is RequestStatus.FINISHED for request in requests)


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_a_common_beginning_is_computed_once(tp_degree):
    """Counted in the tokens that the runtime computes."""
    ours, _ = pair("pre_norm", tp_degree, 3)
    start = STARTS[1][:30]
    asked = [[*start, 50 + i, 60 - i] for i in range(8)]
    computed: list[int] = []
    step = ours.runtime.step

    def counting(one):
        computed.extend(one.tokens.tolist())
        return step(one)

    ours(torch.tensor([[5], [6], [7]]))  # nothing is left of earlier tests
    ours.runtime.step = counting
    try:
        results = ours.generate_batch(asked, progress_bar=False, **GREEDY, max_new_tokens=5)
    finally:
        del ours.runtime.step
    for prompt, output in zip(asked, results.values(), strict=True):
        assert output.generated_tokens == alone("pre_norm", tuple(prompt), 5)
    generated = sum(len(output.generated_tokens) - 1 for output in results.values())
    assert len(computed) == 30 + 2 * 8 + generated
    assert results.statistics.prefix_hits == 7 and results.statistics.prefix_tokens == 7 * 30
    assert results.statistics.tokens_in == 8 * 32


def test_a_seed_gives_the_same_tokens_in_any_company():
    ours, _ = pair("pre_norm", 1, 3)
    drawn = {"do_sample": True, "top_k": 40, "temperature": 1.4, "max_new_tokens": 10, "eos_token_id": None, "seed": 5}
    prompt = [9, 30, 12, 44]
    (single,) = ours.generate_batch([prompt], progress_bar=False, **drawn).values()
    others = [[5 + i] * (1 + 3 * i) for i in range(6)]
    busy = ours.generate_batch([*others, prompt, *others], progress_bar=False, **drawn)
    assert busy["req_6"].generated_tokens == single.generated_tokens
    rest = {name: value for name, value in drawn.items() if name != "seed"}
    results = []
    for _ in range(2):
        set_seed(3)
        results.append([o.generated_tokens for o in ours.generate_batch([prompt] * 5, None, False, **rest).values()])
    assert results[0] == results[1] and len({tuple(tokens) for tokens in results[0]}) > 1


def test_a_request_that_lost_its_slot_goes_on():
    """Another call takes all slots in the middle of a request; what it said stays, and what follows is the same."""
    ours, _ = pair("post_norm", 1, 3)
    maker, prompt = RequestMaker(ours, None), [9, 30, 12, 44, 17]
    (request,) = maker.make("a", prompt, {**GREEDY, "max_new_tokens": 12})
    batcher = Batcher(ours.engine, ours.prefixes)
    batcher.add(request)
    for _ in range(4):
        batcher.step()
    assert len(request.generated) == 4
    ours.generate(torch.tensor([[5, 6, 7]] * 3), max_new_tokens=3, do_sample=False)
    while batcher.step():
        pass
    assert request.generated == alone("post_norm", tuple(prompt), 12)


def test_running_rows_wait_for_a_chunk_at_most():
    """While a long prompt is encoded, every step has the rows that decode, and no more than a chunk of the prompt."""
    ours, _ = pair("pre_norm", 1, 3)
    maker = RequestMaker(ours, None)
    batcher = Batcher(ours.engine, Prefixes(ours.engine.slots), 4)
    (first,) = maker.make("a", [9, 30, 12], {**GREEDY, "eos_token_id": None, "max_new_tokens": 20})
    (long,) = maker.make("b", [10 + i for i in range(40)], {**GREEDY, "max_new_tokens": 2})
    sizes = []
    step = ours.runtime.step
    ours.runtime.step = lambda one: (sizes.append(len(one.tokens)), step(one))[1]
    try:
        batcher.add(first)
        batcher.step()
        batcher.add(long)
        for said in range(2, 12):
            batcher.step()
            assert len(first.generated) == said
        assert sizes == [3] + [5] * 10 and len(long.generated) == 1
    finally:
        del ours.runtime.step
        batcher.abort("the test is over")
