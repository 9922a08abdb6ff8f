"""More rows than slots: one result, in the order of the prompts."""

from __future__ import annotations

import pytest
import torch
from against_transformers import generate, pair, ragged
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from optimum_opt_trn.generation.batches import Batches, _joined_steps
from optimum_opt_trn.generation.transformers_versions import CACHE


def batches(prompts: int, batch_size: int, arguments: dict | None = None, **options) -> Batches:
    asked = GenerationConfig(**options)
    return Batches(torch.arange(prompts)[:, None] + 5, asked, arguments or {}, batch_size)


@pytest.mark.parametrize(
    ("prompts", "batch_size", "options", "count"),
    [
        (4, 4, {}, 1),
        (5, 4, {}, 2),
        (3, 4, {"num_beams": 2}, 2),
        (2, 4, {"num_beams": 2, "guidance_scale": 1.5}, 2),
        (4, 4, {"guidance_scale": 1.5}, 2),
        (4, 4, {"guidance_scale": 1}, 1),
        (2, 4, {"num_return_sequences": 4, "do_sample": True}, 2),
        (3, 4, {"num_beams": 2, "num_return_sequences": 2}, 2),
        (3, 4, {"prompt_lookup_num_tokens": 2}, 3),
    ],
)
def test_how_a_call_is_cut(prompts, batch_size, options, count):
    assert len(batches(prompts, batch_size, **options)) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 5}, "num_beams=5 make 5 rows of one prompt.*batch_size=4.*batch_size=5 or more"),
        ({"num_beams": 3, "guidance_scale": 2.0}, "num_beams=3 and guidance_scale=2.0 make 6 rows.*batch_size=6"),
    ],
)
def test_rows_of_a_prompt_must_fit(options, message):
    with pytest.raises(ValueError, match=message):
        batches(1, 4, **options)


@pytest.mark.parametrize("name", ["streamer", CACHE])
def test_what_cannot_be_cut(name):
    batches(4, 4, {name: TextStreamer})
    with pytest.raises(ValueError, match=f"{name} is for one batch, and 5 rows.*batch_size=4"):
        batches(5, 4, {name: TextStreamer})


def test_each_batch_gets_its_rows():
    calls = []

    def record(rows: Tensor, config: GenerationConfig | None, **arguments) -> Tensor:
        calls.append((rows, arguments))
        return torch.cat([rows, torch.full((len(rows), len(calls)), 50)], dim=1)

    ids = torch.arange(5)[:, None] + 5
    arguments = {
        "attention_mask": torch.arange(5)[:, None],
        "negative_prompt_ids": torch.arange(10)[:, None],
        "prefix_allowed_tokens_fn": lambda batch, row: [batch],
        "num_return_sequences": 2,
        "max_time": 100.0,
    }
    asked = GenerationConfig(do_sample=True, num_return_sequences=2, max_time=100.0, pad_token_id=1)
    out = Batches(ids, asked, arguments, 4).run(record, None)
    assert [rows[:, 0].tolist() for rows, _ in calls] == [[5, 5, 6, 6], [7, 7, 8, 8], [9, 9]]
    assert [a["attention_mask"][:, 0].tolist() for _, a in calls] == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4]]
    assert [a["negative_prompt_ids"][:, 0].tolist() for _, a in calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [a["prefix_allowed_tokens_fn"](1, ids[0]) for _, a in calls] == [[1], [5], [9]]
    assert all(a["num_return_sequences"] == 1 for _, a in calls)
    assert all(0 <= a["max_time"] <= 100 for _, a in calls)
    assert out[:, 0].tolist() == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert out[0].tolist() == [5, 50, 1, 1] and out[-1].tolist() == [9, 50, 50, 50]


@pytest.mark.parametrize(
    ("options", "fill"),
    [
        ({"pad_token_id": 1, "eos_token_id": 2}, 1),
        ({"eos_token_id": [3, 2]}, 3),
        ({}, 0),
        ({"num_beams": 2, "pad_token_id": 1}, -1),
        ({"num_beams": 2, "pad_token_id": 1, "eos_token_id": 2}, 1),
        ({"num_beams": 2, "pad_token_id": 0, "eos_token_id": 2}, 2),
    ],
)
def test_shorter_batches_are_filled_up_as_transformers_does(options, fill):
    lengths = iter([3, 2])
    joined = batches(3, 2 * options.get("num_beams", 1), **options).run(
        lambda rows, config, **_: rows.repeat(1, next(lengths)), None
    )
    assert joined[-1].tolist()[2:] == [fill]


def test_scores_and_beams_are_merged():
    def batch(prompts: int, steps: int) -> GenerateBeamDecoderOnlyOutput:
        rows = 2 * prompts
        return GenerateBeamDecoderOnlyOutput(
            sequences=torch.full((prompts, 1 + steps), prompts),
            sequences_scores=torch.full((prompts,), -float(steps)),
            scores=tuple(torch.full((rows, 4), float(step)) for step in range(steps)),
            beam_indices=torch.tensor([[0] * steps + [-1]] + [[2] * steps + [-1]] * (prompts - 1)),
        )

    results = iter([batch(2, 1), batch(1, 3)])
    out = batches(3, 4, num_beams=2, pad_token_id=1, eos_token_id=2).run(lambda *_, **__: next(results), None)
    assert isinstance(out, GenerateBeamDecoderOnlyOutput) and out.past_key_values is None and out.logits is None
    assert out.sequences.shape == (3, 4)
    assert out.sequences_scores.tolist() == [-1, -1, -3]
    assert out.beam_indices.tolist() == [[0, -1, -1, -1], [2, -1, -1, -1], [4, 4, 4, -1]]
    assert [step.shape for step in out.scores] == [(6, 4)] * 3
    assert out.scores[2][:4].eq(-torch.inf).all() and out.scores[2][4:].eq(2).all()


def test_prefixes_know_their_prompt_in_every_batch():
    ours, _ = pair("pre_norm", 1, 3)

    def own_ids(batch: int, row: Tensor) -> list[int]:
        return [10 + batch, 20 + batch]

    options = {**ragged([3, 1, 2, 4]), "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 1}
    for extra, rows in (({}, 4), ({"num_beams": 2}, 4), ({"num_return_sequences": 2, "do_sample": True}, 8)):
        out = generate(ours, {**options, "prefix_allowed_tokens_fn": own_ids, **extra})
        for i, row in enumerate(out):
            assert {*row[4:].tolist()} <= {10 + i, 20 + i}
        assert len(out) == rows


def test_results_are_those_of_the_prompts_alone():
    ours, reference = pair("pre_norm", 2, 3)
    prompts = ragged([3, 9, 2, 4, 1, 7, 5])
    options = {"max_new_tokens": 8, "eos_token_id": [7, 20, 33, 46], "pad_token_id": 1}
    details = {"return_dict_in_generate": True, "output_scores": True}
    out = generate(ours, {**prompts, **options, **details})
    assert isinstance(out, GenerateDecoderOnlyOutput) and out.past_key_values is None
    for i in range(7):
        alone = {name: tensor[i : i + 1] for name, tensor in prompts.items()}
        expected = generate(reference, {**alone, **options, **details})
        steps = len(expected.scores)
        assert out.sequences[i, : 9 + steps].tolist() == expected.sequences[0].tolist()
        for mine, theirs in zip(out.scores, expected.scores, strict=False):
            torch.testing.assert_close(mine[i], theirs[0], atol=1e-3, rtol=1e-4)


class StopsEachRow(StoppingCriteria):
    """As lm-evaluation-harness's: has a place for each row that it was made for, and keeps what it saw."""

    def __init__(self, rows: int, end: int):
        self.done, self.end = [False] * rows, end

    def __call__(self, input_ids, scores, **kwargs):
        for row in range(len(self.done)):
            self.done[row] = self.done[row] or int(input_ids[row, -1]) == self.end
        return torch.tensor(self.done)


@pytest.mark.parametrize("rows", [4, 5])
def test_a_criterion_with_state_for_each_row(rows):
    ours, reference = pair("pre_norm", 1, 3)
    prompts = ragged([4, 2, 5, 3, 6][-rows:])
    width = prompts["input_ids"].shape[1]
    asked = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 1}
    plain = reference.generate(**prompts, **asked)
    end = int(plain[-1, width + 5])  # what the last row says in the middle
    criteria = StoppingCriteriaList([StopsEachRow(rows, end)])
    expected = reference.generate(
        **prompts, **asked, stopping_criteria=StoppingCriteriaList([StopsEachRow(rows, end)])
    )
    got = ours.generate(**prompts, **asked, stopping_criteria=criteria)
    for mine, theirs in zip(got[:, width:].tolist(), expected[:, width:].tolist(), strict=True):
        length = theirs.index(end) + 1 if end in theirs else len(theirs)
        assert mine[:length] == theirs[:length]
    assert criteria[0].done == [False] * rows, "the caller's own is not changed by a batch"


def test_a_batch_that_ends_without_a_step_joins_those_that_do():
    """As with prompt lookup, whose scores for a row may be of no step. A soak found it."""
    steps = (torch.arange(3.0)[None], torch.arange(3.0)[None] + 1)
    joined = _joined_steps([(), steps, steps[:1]])
    assert [step.tolist() for step in joined] == [
        [[-torch.inf] * 3, [0, 1, 2], [0, 1, 2]],
        [[-torch.inf] * 3, [1, 2, 3], [-torch.inf] * 3],
    ]
    assert _joined_steps([(), ()]) == ()
