"""generate() and pipelines with more rows than slots: each row takes a slot as soon as one is free."""

from __future__ import annotations

import pytest
import torch
from against_transformers import assert_possible, assert_same, generate, pair, ragged
from transformers import LogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput

from optimum_opt_trn.generation.batches import Batches


LENGTHS = [3, 9, 2, 4, 1, 7, 5, 8]
ENDS = {"eos_token_id": [7, 20, 33, 46], "pad_token_id": 1, "max_new_tokens": 9}


@pytest.fixture
def batches(monkeypatch) -> list[Batches]:
    """The calls that ran in batches, one after the other."""
    made, run = [], Batches.run

    def noting(self, *arguments):
        made.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(Batches, "run", noting)
    return made


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": None},
        {"min_new_tokens": 4},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 2},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_rows_are_those_of_transformers(kind, tp_degree, side, options, batches):
    ours, reference = pair(kind, tp_degree, 3)
    prompts = {name: tensor.flip(1) if side == "right" else tensor for name, tensor in ragged(LENGTHS).items()}
    out = ours.generate(**prompts, **{**ENDS, **options}, do_sample=False)
    assert batches == []
    details = isinstance(out, GenerateDecoderOnlyOutput)
    assert details == ("return_dict_in_generate" in options)
    sequences = out.sequences if details else out
    theirs = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    width = prompts["input_ids"].shape[1]
    assert torch.equal(sequences[:, :width], prompts["input_ids"])
    if side == "left":
        assert_same(out, reference.generate(**prompts, **{**ENDS, **theirs}, do_sample=False))
        return
    for row, ids, mask in zip(sequences[:, width:].tolist(), *prompts.values(), strict=True):
        alone = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        if "repetition_penalty" not in options:  # which counts the padding
            expected = reference.generate(**alone, **{**ENDS, **theirs}, do_sample=False)
            tokens = (expected.sequences if details else expected)[0, int(mask.sum()) :].tolist()
            assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {1}


def test_sampled_rows_are_possible_and_follow_the_seed(batches):
    ours, reference = pair("pre_norm", 1, 3)
    options = {**ragged(LENGTHS), **ENDS, "do_sample": True, "top_k": 12, "top_p": 0.9, "num_return_sequences": 2}
    first, again, other = (generate(ours, options, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first[:, :12], other[:, :12]) and len(first) == 16
    assert_possible(reference, first, options)
    assert batches == []


@pytest.mark.parametrize(
    "options",
    [
        {"output_scores": True, "return_dict_in_generate": True},
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_looks_at_other_rows_runs_in_batches(options, batches):
    ours, reference = pair("pre_norm", 1, 3)
    asked = {**ragged(LENGTHS[:4]), **ENDS, "do_sample": False, **options}
    out = generate(ours, asked)
    assert len(batches) == 1 and len(batches[0]) > 1
    assert_same(out, generate(reference, asked), batches=True)


def test_time_ends_all_rows():
    ours, _ = pair("pre_norm", 1, 3)
    out = ours.generate(**ragged(LENGTHS), **{**ENDS, "eos_token_id": None}, do_sample=False, max_time=1e-6)
    assert out.shape == (8, 10)  # a token each


def test_an_error_is_raised_and_the_next_call_works(monkeypatch):
    ours, reference = pair("pre_norm", 1, 3)
    step, calls = ours.runtime.step, []

    def fails_once(one):
        calls.append(one)
        if len(calls) == 4:
            raise OSError("the device is gone")
        return step(one)

    ours.runtime.step = fails_once
    try:
        with pytest.raises(OSError, match="the device is gone"):
            ours.generate(**ragged(LENGTHS), **ENDS, do_sample=False)
    finally:
        del ours.runtime.step
    asked = {**ragged(LENGTHS), **ENDS, "do_sample": False}
    assert_same(ours.generate(**asked), reference.generate(**asked))


class Nested(LogitsProcessor):
    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call(input_ids)
        return scores


def test_generate_within_a_batch_raises_by_name():
    ours, _ = pair("pre_norm", 1, 3)
    nested = [Nested(lambda ids: ours.generate(ids, max_new_tokens=1))]
    results = ours.generate_batch([[5, 6]], progress_bar=False, **ENDS, logits_processor=nested)
    assert "generate() was called within a generate()" in results["req_0"].error
