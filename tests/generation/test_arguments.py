"""What users pass to generate(): any form of prompts works, and what cannot is told with its way out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from against_transformers import assert_same, pair, ragged
from small_models import rounded, tiny_opt
from transformers import BatchEncoding

from optimum_opt_trn import NeuronOPTForCausalLM


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 6}


@pytest.mark.parametrize("form", [lambda rows: rows, tuple, np.array, lambda rows: BatchEncoding({"input_ids": rows})])
def test_prompts_in_any_form(form):
    ours, reference = pair()
    rows = [[2, 5, 6], [2, 7, 8]]
    assert torch.equal(ours.generate(form(rows), **GREEDY), reference.generate(torch.tensor(rows), **GREEDY))


def test_what_a_tokenizer_returned_with_its_mask():
    ours, reference = pair()
    prompts = ragged([3, 5])
    expected = reference.generate(**prompts, **GREEDY)
    assert torch.equal(ours.generate(BatchEncoding(prompts), **GREEDY), expected)
    lists = {name: values.tolist() for name, values in prompts.items()}
    assert torch.equal(ours.generate(BatchEncoding(lists), **GREEDY), expected)
    assert torch.equal(ours.generate(**lists, **GREEDY), expected)


IDS = torch.tensor([[5, 6, 7]])
REFUSED = {
    "text": (lambda m: m.generate("Hello"), TypeError, "input_ids is text, 'Hello'.*tokenizer.*pipeline"),
    "texts": (lambda m: m.generate(["Hello", "you"]), TypeError, "input_ids is text, 'Hello'"),
    "ragged lists": (
        lambda m: m.generate([[2, 5], [2]]),
        ValueError,
        "cannot be made one.*equally long.*padding=True",
    ),
    "one dimension": (lambda m: m.generate([2, 5, 6]), ValueError, r"\(rows, tokens\).*\(3,\).*input_ids\[None\]"),
    "floats": (lambda m: m.generate(torch.ones(1, 10)), ValueError, r"torch.float32.*input_ids.long\(\)"),
    "padding only": (
        lambda m: m.generate(torch.ones(2, 10, dtype=torch.long), pad_token_id=1),
        ValueError,
        r"Every token of row 0 is the pad token \(pad_token_id=1\).*attention_mask=torch.ones_like",
    ),
    "padding in one row": (
        lambda m: m.generate(torch.tensor([[5, 6], [1, 1]]), pad_token_id=1),
        ValueError,
        "Every token of row 1 is the pad token",
    ),
    "twice": (lambda m: m.generate({"input_ids": IDS}, input_ids=IDS), TypeError, "got input_ids twice"),
    "a typo": (lambda m: m.generate(IDS, temprature=0.7), TypeError, "'temprature': did you mean 'temperature'"),
    "a typo of an argument": (lambda m: m.generate(IDS, streamers=1), TypeError, "did you mean 'streamer'"),
    "no beams": (lambda m: m.generate(IDS, num_beams=0), ValueError, "num_beams=0 must be a positive"),
    "no sequences": (
        lambda m: m.generate(IDS, do_sample=True, num_return_sequences=0),
        ValueError,
        "num_return_sequences=0",
    ),
    "an empty word": (
        lambda m: m.generate(IDS, bad_words_ids=[[5], []]),
        ValueError,
        r"bad_words_ids=\[\[5\], \[\]\]",
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_cannot_be_is_told(call):
    do, kind, message = REFUSED[call]
    ours, _ = pair()
    with pytest.raises(kind, match=message):
        do(ours)
    assert torch.equal(ours.generate(IDS, **GREEDY), pair()[1].generate(IDS, **GREEDY))


def test_padding_only_counts_with_a_mask():
    ours, reference = pair()
    ids = torch.ones(1, 5, dtype=torch.long)
    asked = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(ours.generate(ids, **asked), reference.generate(ids, **asked))


def test_options_that_custom_code_takes_are_not_ours_to_judge():
    def custom(model, input_ids, my_option=None, **kwargs):
        return input_ids + my_option

    assert torch.equal(pair()[0].generate(IDS, custom_generate=custom, my_option=1), IDS + 1)


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("length", [40, 62, 63])
def test_prompt_lookup_ends_at_the_last_position(length, padded):
    """The candidates would go beyond the cache; with a repeated prompt they nearly all match."""
    ours, reference = pair()
    tokens = (list(range(5, 13)) * 8)[:length]
    ids = torch.tensor([[1] * padded + tokens])
    mask = torch.tensor([[0] * padded + [1] * length])
    asked = {**GREEDY, "max_new_tokens": 64 - length, "attention_mask": mask, "eos_token_id": 3}
    expected = reference.generate(ids, **asked)
    assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=10, **asked), expected)


@pytest.mark.parametrize("room", [20, 48, 64])
def test_an_assistant_ends_at_its_last_position(room, save_opt):
    """An assistant that is exported for less goes on as long as it can."""
    ours, reference = pair()
    source = tiny_opt()
    path = save_opt(source)
    assistant = NeuronOPTForCausalLM.from_pretrained(path, eager=True, sequence_length=room, kv_cache_dtype="f32")
    assistant.generation_config.num_assistant_tokens = 12
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    ids = torch.tensor([list(range(5, 21))])
    asked = {**GREEDY, "max_new_tokens": 48}
    assert torch.equal(ours.generate(ids, assistant_model=assistant, **asked), reference.generate(ids, **asked))
    beyond = torch.tensor([list(range(5, 35))])  # more than the smallest assistant holds
    asked = {**GREEDY, "max_new_tokens": 34, "return_dict_in_generate": True, "output_scores": True}
    theirs = reference.generate(beyond, **asked)
    assert_same(ours.generate(beyond, assistant_model=assistant, **asked).sequences, theirs.sequences)
    assert rounded(source).num_parameters() == assistant.num_parameters()
