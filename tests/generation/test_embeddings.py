"""Prompts as embeddings: `inputs_embeds` of forward() and generate(), as transformers' OPT takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_transformers import TOLERANCE, assert_same, generate, pair, ragged
from small_models import KINDS, tiny_opt
from torch import Tensor
from transformers import OPTForCausalLM


SHORT = {"max_new_tokens": 6, "pad_token_id": 1}


def soft_prompts(reference: OPTForCausalLM, lengths: list[int], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of ragged prompts, two of each row's not of any word, and the ids and mask that they come from."""
    inputs = ragged(lengths, seed=seed)
    embeds = reference.get_input_embeddings()(inputs["input_ids"]).detach().clone()
    generator = torch.Generator().manual_seed(seed)
    embeds[:, -2:] = 0.2 * torch.randn(len(lengths), 2, embeds.shape[2], generator=generator)
    return embeds, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_words_are_transformers(kind):
    ours, reference = pair(kind)
    ids = ragged([7, 3])["input_ids"]
    embeds = ours.get_input_embeddings()(ids)
    assert embeds.dtype == torch.float32 and not embeds.requires_grad
    assert torch.equal(embeds, reference.get_input_embeddings()(ids))


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, tp_degree):
    """Then ids follow, with the cache; and embeddings again."""
    ours, reference = pair(kind, tp_degree)
    embeds, inputs = soft_prompts(reference, [7, 2, 5])
    mask, mine, theirs = inputs["attention_mask"], None, None
    for call in ({"inputs_embeds": embeds}, {"input_ids": inputs["input_ids"][:, -3:]}, {"inputs_embeds": embeds}):
        if mine is not None:
            mask = torch.nn.functional.pad(mask, (0, next(iter(call.values())).shape[1]), value=1)
        with torch.no_grad():
            mine = ours(**call, attention_mask=mask, past_key_values=mine and mine.past_key_values)
            theirs = reference(**call, attention_mask=mask, past_key_values=theirs and theirs.past_key_values)
        real = mask[:, -mine.logits.shape[1] :].bool()
        torch.testing.assert_close(mine.logits[real], theirs.logits[real], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("ids", ["no ids", "all ids", "other ids"])
@pytest.mark.parametrize("kind, tp_degree", [("pre_norm", 1), ("post_norm", 2), ("odd_vocabulary", 2)])
def test_generates_as_transformers(kind, tp_degree, ids):
    ours, reference = pair(kind, tp_degree, 9)
    embeds, inputs = soft_prompts(reference, [7, 2, 5])
    call: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **SHORT}
    if ids != "no ids":
        call["input_ids"] = inputs["input_ids"] if ids == "all ids" else inputs["input_ids"][:, :3]
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"repetition_penalty": 1.8},
        {"min_new_tokens": 4, "eos_token_id": [*range(50, 128)]},
        {"eos_token_id": [*range(90, 128)], "num_beams": 2},
    ):
        assert_same(generate(ours, {**call, **options}), generate(reference, {**call, **options}))


def test_samples_what_ids_sample():
    ours, reference = pair("pre_norm", 1, 3)
    inputs = ragged([7, 2, 5])
    embeds = reference.get_input_embeddings()(inputs["input_ids"]).detach()
    for options in ({"do_sample": True, "top_k": 20}, {"do_sample": True, "top_k": 0, "typical_p": 0.9}):
        by_ids = generate(ours, {**inputs, **SHORT, **options}, seed=3)
        call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **SHORT, **options}
        assert torch.equal(generate(ours, call, seed=3), by_ids[:, 7:])


def test_more_prompts_than_slots():
    ours, reference = pair("pre_norm", 1, 2)
    embeds, inputs = soft_prompts(reference, [7, 2, 5, 4, 6])
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **SHORT}
    for options in ({}, {"num_beams": 2}, {"input_ids": inputs["input_ids"]}):
        assert_same(ours.generate(**call, **options), reference.generate(**call, **options))
    with torch.no_grad():
        mine, theirs = (
            m(inputs_embeds=embeds, attention_mask=call["attention_mask"]).logits for m in (ours, reference)
        )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(mine[real], theirs[real], atol=TOLERANCE, rtol=1e-4)


def test_in_chunks_and_with_a_cache_as_at_once():
    ours, reference = pair("pre_norm")
    embeds, inputs = soft_prompts(reference, [9, 4])
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **SHORT}
    expected = reference.generate(**call)
    assert torch.equal(ours.generate(**call, prefill_chunk_size=2), expected)
    past = ours(inputs_embeds=embeds[:, :6], attention_mask=inputs["attention_mask"][:, :6]).past_key_values
    assert torch.equal(ours.generate(**call, past_key_values=past), expected)


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_goes_on_from_a_result_with_embeddings(tp_degree):
    """A conversation: the words so far as embeddings, with the cache of the call before."""
    ours, reference = pair("pre_norm", tp_degree)
    embeds, inputs = soft_prompts(reference, [7, 2, 5])
    table, mask = reference.get_input_embeddings(), inputs["attention_mask"]
    expected = reference.generate(inputs_embeds=embeds, attention_mask=mask, **SHORT)
    first = ours.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2, pad_token_id=1, return_dict_in_generate=True
    )
    assert torch.equal(first.sequences, expected[:, :2])
    whole = torch.cat([embeds, table(first.sequences).detach()], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    call = {"inputs_embeds": whole, "attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 1}
    past = first.get("past_key_values") or first.cache
    assert torch.equal(ours.generate(**call, past_key_values=past), expected[:, 2:])
    assert torch.equal(ours.generate(**call), expected[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_and_lists(dtype):
    ours, _ = pair("pre_norm")
    embeds = ours.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    embeds = embeds.to(torch.bfloat16).to(dtype)
    assert torch.equal(
        ours.generate(inputs_embeds=embeds, **SHORT), ours.generate(inputs_embeds=embeds.tolist(), **SHORT)
    )


def test_ends_where_the_export_does(load_opt):
    ours = load_opt(tiny_opt(), sequence_length=32)
    embeds = ours.get_input_embeddings()(torch.full((1, 20), 5))
    assert ours.generate(inputs_embeds=embeds, max_new_tokens=12).shape == (1, 12)
    with_ids = ours.generate(inputs_embeds=embeds, input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=12)
    assert with_ids.shape == (1, 15)
    with pytest.raises(ValueError, match="A prompt of 20 tokens and 13 new ones do not fit the sequence_length=32"):
        ours.generate(inputs_embeds=embeds, max_new_tokens=13)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dimensions": ({"inputs_embeds": torch.zeros(3, 64)}, ValueError, r"shape \(rows, tokens, 64\)"),
    "size": ({"inputs_embeds": torch.zeros(1, 3, 32)}, ValueError, r"shape \(rows, tokens, 64\).*\(1, 3, 32\)"),
    "integers": ({"inputs_embeds": torch.zeros(1, 3, 64).int()}, ValueError, "floating-point"),
    "NaN": ({"inputs_embeds": torch.full((1, 3, 64), torch.nan)}, ValueError, r"not finite \(row 0, place 0\)"),
    "mask": (
        {"inputs_embeds": torch.zeros(1, 3, 64), "attention_mask": torch.ones(1, 2)},
        ValueError,
        r"attention_mask has shape \(1, 2\), but inputs_embeds has \(1, 3\)",
    ),
    "empty": ({"inputs_embeds": torch.zeros(1, 0, 64)}, ValueError, "The prompt of row 0 is empty"),
    "long": ({"inputs_embeds": torch.zeros(1, 65, 64)}, ValueError, "65 tokens does not fit the sequence_length=64"),
}
WRONG_IN_GENERATE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows of ids": (
        {"inputs_embeds": torch.zeros(1, 3, 64), "input_ids": torch.ones(2, 3).long()},
        ValueError,
        "input_ids has shape",
    ),
    "ids": (
        {"inputs_embeds": torch.zeros(1, 3, 64), "input_ids": torch.tensor([[128]])},
        ValueError,
        "Token id 128",
    ),
    "lookup": (
        {"inputs_embeds": torch.zeros(1, 3, 64), "prompt_lookup_num_tokens": 2},
        NotImplementedError,
        "prompt_lookup_num_tokens",
    ),
    "guidance": ({"inputs_embeds": torch.zeros(1, 3, 64), "guidance_scale": 2}, ValueError, "negative_prompt_ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_ones_are_refused_before_any_work(case, monkeypatch):
    ours, _ = pair("pre_norm")
    arguments, kind, message = WRONG[case]
    monkeypatch.setattr(ours.runtime, "step", lambda *_: pytest.fail("the device was called"))
    for call in (ours, ours.generate):
        with pytest.raises(kind, match=message):
            call(**arguments)


@pytest.mark.parametrize("case", WRONG_IN_GENERATE)
def test_what_does_not_go_with_them_is_refused(case):
    ours, _ = pair("pre_norm")
    arguments, kind, message = WRONG_IN_GENERATE[case]
    with pytest.raises(kind, match=message):
        ours.generate(**arguments)


def test_a_runtime_that_does_not_serve_them_says_so(monkeypatch):
    """As that of the neuron target; see its own tests."""
    ours, _ = pair("pre_norm")
    monkeypatch.setattr(type(ours.runtime), "unserved", {"inputs_embeds": "because", "output_attentions": "why not"})
    for call in (ours, ours.generate):
        with pytest.raises(NotImplementedError, match="inputs_embeds.* is not served: because"):
            call(inputs_embeds=torch.zeros(1, 3, 64))
        with pytest.raises(NotImplementedError, match="output_attentions.* is not served: why not"):
            call(torch.tensor([[5]]), output_attentions=True)
