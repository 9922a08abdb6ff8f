"""The engine: steps of any mixture, one call at a time, from any number of threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from against_transformers import pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from optimum_opt_trn.generation.engine import Engine
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets import Step, StepResult


class Rows:
    """Sequences as a scheduler would keep them, without transformers."""

    def __init__(self, rows: list[int]):
        self.rows = rows
        self.lengths = torch.zeros(len(rows), dtype=torch.int64)

    def append(self, mask: Tensor) -> None:
        self.lengths = self.lengths + mask.sum(-1)


def logits_alone(reference, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([1, 2]))
def test_a_step_may_mix_prompts_chunks_and_single_tokens(data, tp_degree):
    """The logits of a wanted token depend only on its own sequence, not on what else is in the step."""
    ours, reference = pair("pre_norm", tp_degree, 4)
    histories: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 4))):
        slots = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        tokens, owners, positions, wanted, sampled, expected = [], [], [], [], [], []
        for slot in slots:
            if data.draw(st.booleans()):
                histories[slot] = []  # another sequence takes the slot
            past = len(histories.setdefault(slot, []))
            new = data.draw(st.lists(st.integers(4, 127), min_size=1, max_size=5))
            histories[slot] += new
            logits = logits_alone(reference, histories[slot])
            for place, token in enumerate(new):
                if data.draw(st.booleans()):
                    wanted.append(len(tokens))
                    expected.append(logits[past + place])
                    if place == len(new) - 1:
                        sampled.append(logits[-1])
                tokens.append(token)
                owners.append(slot)
                positions.append(past + place)
        step = Step(
            torch.tensor(tokens, dtype=torch.int32),
            torch.tensor(owners),
            torch.tensor(positions),
            torch.tensor(wanted, dtype=torch.int64),
            SamplingInputs.greedy(len(sampled)),
        )
        result = ours.runtime.step(step)
        assert result.logits.shape == (len(wanted), 128) and result.tokens.shape == (len(sampled),)
        if wanted:
            torch.testing.assert_close(result.logits, torch.stack(expected), atol=1e-3, rtol=1e-4)
        for token, logits in zip(result.tokens, sampled, strict=True):
            assert logits.max() - logits[token] <= 1e-4 * logits.std()


def test_the_loop_needs_no_transformers_class():
    ours, reference = pair("post_norm", 1, 3)
    engine = Engine(ours.runtime, 3, ours.neuron_config.sequence_length)
    rows = Rows(engine.slots.allocate(2))
    prompts = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    said: list[list[int]] = [[], []]

    def advance(result: StepResult) -> tuple[Tensor, SamplingInputs] | None:
        for row, token in zip(said, result.tokens.tolist(), strict=True):
            row.append(token)
        return (result.tokens, SamplingInputs.greedy(2)) if len(said[0]) < 6 else None

    engine.run(rows, prompts, mask, SamplingInputs.greedy(2), advance)
    for row, real, tokens in zip(prompts, mask, said, strict=True):
        expected = reference.generate(
            row[real][None], do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=1
        )
        assert tokens == expected[0, int(real.sum()) :].tolist()
    assert rows.lengths.tolist() == [8, 7]


def test_threads_are_served_in_turn():
    """Four threads, `generate` and `forward` on one model whose slots do for one call only: all results right."""
    ours, reference = pair("pre_norm", 1, 2)
    asked = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 1}
    prompts = [torch.tensor([[5 + i, 6, 7 + i], [8, 9 + i, 10]])[:, : 2 + i % 2] for i in range(8)]
    tokens = [reference.generate(prompt, **asked) for prompt in prompts]
    with torch.no_grad():
        logits = [reference(prompt).logits for prompt in prompts]
    start = threading.Barrier(4)

    def calls(thread: int) -> None:
        start.wait()
        for call in range(60):
            at = (thread + call) % len(prompts)
            if (call + thread) % 2:
                assert torch.equal(ours.generate(prompts[at], **asked), tokens[at])
            else:
                torch.testing.assert_close(ours(prompts[at]).logits, logits[at], atol=1e-3, rtol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(calls, thread) for thread in range(4)]:
            done.result()


class Nested(LogitsProcessor):
    """Asks the model for a continuation in the middle of one, or for logits."""

    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.call(input_ids)
        return scores


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 0}])
def test_generate_within_generate_is_refused(mode):
    ours, _ = pair("pre_norm", 1, 3)
    ids = torch.tensor([[5, 6, 7]])
    expected = ours.generate(ids, max_new_tokens=3, do_sample=False)
    nested = LogitsProcessorList([Nested(lambda ids: ours.generate(ids, max_new_tokens=1))])
    with pytest.raises(RuntimeError, match="within a generate.. of the same model.*second model"):
        ours.generate(ids, max_new_tokens=3, logits_processor=nested, **mode)
    # The next call works, and logits in the middle of a call are served where there is a slot for them.
    with_logits = LogitsProcessorList([Nested(lambda ids: ours(ids[:1]))])
    assert torch.equal(ours.generate(ids, max_new_tokens=3, do_sample=False, logits_processor=with_logits), expected)
