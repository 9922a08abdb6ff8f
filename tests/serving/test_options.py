"""Options of requests: each its own, the same as in generate(), errors before any work."""

from __future__ import annotations

import pytest
import torch
from against_transformers import pair
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.continuous_batching.requests import RequestStatus


PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 8}
PROMPT = [9, 30, 12, 44, 17]


class Only(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        assert input_ids.shape == (1, scores.shape[1] and input_ids.shape[1]) and len(scores) == 1
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.token] = 0
        return kept


class Tokenizer:
    """Token i is the letter i."""

    vocab = {chr(0x4E00 + i): i for i in range(128)}

    def get_vocab(self):
        return self.vocab

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def __call__(self, text, **kwargs):
        raise AssertionError("stop strings need the vocabulary only")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [7, 20, 33, 46]},
        {"min_new_tokens": 5, "eos_token_id": [7, 20, 33, 46]},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"max_new_tokens": None, "max_length": 9},
        {"suppress_tokens": [5, 6, 7, 8]},
        {"encoder_repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_each_request_has_options_of_its_own(options):
    ours, reference = pair("pre_norm", 1, 3)
    with ours.init_continuous_batching(GenerationConfig(**PLAIN)) as manager:
        other = manager.add_request(PROMPT)
        mine = manager.add_request(PROMPT, **options)
        for name, asked in ((other, {}), (mine, options)):
            expected = reference.generate(torch.tensor([PROMPT]), **{**PLAIN, **asked})[0, 5:].tolist()
            assert manager.get_result(name).generated_tokens == expected


def test_processors_of_the_caller_see_their_row_only():
    ours, _ = pair("pre_norm", 1, 3)
    with ours.init_continuous_batching(GenerationConfig(**PLAIN)) as manager:
        names = [manager.add_request(PROMPT, logits_processor=[Only(50 + i)]) for i in range(5)]
        assert [manager.get_result(name).generated_tokens for name in names] == [[50 + i] * 8 for i in range(5)]


def test_several_sequences_and_log_probabilities():
    ours, reference = pair("pre_norm", 1, 3)
    drawn = {**PLAIN, "do_sample": True, "top_k": 20, "temperature": 1.3}
    results = ours.generate_batch([PROMPT, PROMPT[::-1]], None, False, **drawn, n=3, seed=1, logprobs=True)
    assert list(results) == [f"req_{i}{child}" for i in (0, 1) for child in ("__child#0", "__child#1", "")]
    assert len({tuple(one.generated_tokens) for one in results.values()}) == 6
    for one in results.values():
        ids = torch.tensor([one.prompt_ids + one.generated_tokens])
        scores = reference(ids).logits[0].log_softmax(-1)
        wanted = scores[range(4, 12), one.generated_tokens]
        torch.testing.assert_close(torch.tensor(one.logprobs), wanted, atol=1e-3, rtol=1e-3)
    again = ours.generate_batch([PROMPT], None, False, **drawn, n=3, seed=1)
    assert [one.generated_tokens for one in again.values()] == [
        one.generated_tokens for one in list(results.values())[:3]
    ]


def test_generation_configs_and_their_lengths():
    ours, _ = pair("pre_norm", 1, 3)
    own = ours.generate_batch([PROMPT], progress_bar=False, do_sample=False, eos_token_id=None)
    assert len(own["req_0"].generated_tokens) == 20  # transformers' default
    near = ours.generate_batch([PROMPT * 12], progress_bar=False, do_sample=False, eos_token_id=None)
    assert len(near["req_0"].generated_tokens) == 4  # what the slot has room for
    config = GenerationConfig(**PLAIN, prefill_chunk_size=2)
    assert len(ours.generate_batch([PROMPT], config, False)["req_0"].generated_tokens) == 8
    assert config.max_new_tokens == 8 and config.prefill_chunk_size == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "is empty"),
        ([5] * 64, {}, "64 tokens leaves no room.*sequence_length=64"),
        ([5] * 60, {"max_new_tokens": 8}, "60 tokens and 8 new ones.*at most 4"),
        ([5, 900], {}, "Token id 900.*from 0 to 127"),
        ([5] * 9, {"max_new_tokens": None, "max_length": 9}, "max_length=9"),
    ],
)
def test_a_prompt_that_does_not_fit_ends_its_request(prompt, options, message):
    ours, _ = pair("pre_norm", 1, 3)
    results = ours.generate_batch([PROMPT[:3], prompt, PROMPT[:2]], None, False, **{**PLAIN, **options})
    statuses = [one.status for one in results.values()]
    assert statuses == [RequestStatus.FINISHED, RequestStatus.FAILED, RequestStatus.FINISHED]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(results["req_1"].error)
    assert (results.statistics.requests_done, results.statistics.requests_failed) == (2, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2}, TypeError, "temperature"),
        ({"num_beams": 2}, NotImplementedError, "not beam search"),
        ({"guidance_scale": 2.0}, NotImplementedError, "guidance_scale=2.0"),
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "not assisted generation"),
        ({"output_scores": True}, NotImplementedError, "output_scores=True: ask for logprobs=True"),
        ({"prefill_chunk_size": 3}, NotImplementedError, "prefill_chunk_size=3.*generation_config"),
        ({"cache_implementation": "static"}, NotImplementedError, "cache_implementation"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
        ({"seed": "a"}, ValueError, "seed='a'"),
        ({"priority": True}, ValueError, "priority=True"),
        ({"n": 0}, ValueError, "n=0 must be"),
        ({"logits_processor": Only(3)}, ValueError, "must be a list"),
        ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_options_that_mean_nothing_raise_at_once(options, error, message):
    ours, _ = pair("pre_norm", 1, 3)
    manager = ours.init_continuous_batching(GenerationConfig(**PLAIN))
    with pytest.raises(error, match=message):
        manager.add_request(PROMPT, **options)
    with pytest.raises(error, match=message):
        ours.generate_batch([PROMPT], None, False, **{**PLAIN, **options})


@pytest.mark.parametrize(("prompt", "error"), [("Hello", TypeError), ([[5, 6], [7, 8]], ValueError)])
def test_prompts_that_are_none(prompt, error):
    ours, _ = pair("pre_norm", 1, 3)
    with pytest.raises(error, match="input_ids"):
        ours.generate_batch([prompt], progress_bar=False)


def test_prompts_in_any_form_and_lazily():
    ours, _ = pair("pre_norm", 1, 3)
    forms = [PROMPT, tuple(PROMPT), torch.tensor(PROMPT), torch.tensor([PROMPT]), torch.tensor(PROMPT).numpy()]
    results = ours.generate_batch((form for form in forms), progress_bar=False, **PLAIN)
    assert len({tuple(one.generated_tokens) for one in results.values()}) == 1 and len(results) == 5


def test_manager_options():
    ours, _ = pair("pre_norm", 1, 3)
    with pytest.raises(ValueError, match="max_queue_size=-1"):
        ours.init_continuous_batching(max_queue_size=-1)
