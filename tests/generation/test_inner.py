"""Hidden states and attentions: those of transformers' OPT, whose attention is its eager one."""

from __future__ import annotations

import functools

import pytest
import torch
from against_transformers import assert_same, assert_same_inside, pair, ragged
from small_models import KINDS, tiny_opt
from transformers import OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM


INNER = {"output_hidden_states": True, "output_attentions": True}
SHORT = {"max_new_tokens": 4, "pad_token_id": 1, "return_dict_in_generate": True}


@functools.cache
def eager_pair(kind: str, tp_degree: int, batch_size: int = 3) -> tuple[NeuronOPTForCausalLM, OPTForCausalLM]:
    ours, reference = pair(kind, tp_degree, batch_size)
    reference.set_attn_implementation("eager")
    return ours, reference


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_call(kind, tp_degree):
    ours, reference = eager_pair(kind, tp_degree)
    inputs = ragged([7, 2, 5])
    inputs["attention_mask"][0, 3] = 0  # a hole
    with torch.no_grad():
        mine, theirs = ours(**inputs, **INNER), reference(**inputs, **INNER)
        assert len(mine.hidden_states) == len(mine.attentions) + 1 == 3
        assert_same_inside(mine, theirs, inputs["attention_mask"])
        # The next call sees the columns of the first.
        new = {"input_ids": torch.tensor([[9, 8], [7, 6], [5, 4]])}
        new["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        mine = ours(**new, past_key_values=mine.past_key_values, **INNER)
        theirs = reference(**new, past_key_values=theirs.past_key_values, **INNER)
    assert mine.attentions[0].shape == (3, 4, 2, 9)
    assert_same_inside(mine, theirs)


def test_each_on_its_own_and_only_where_asked_for():
    ours, _ = eager_pair("pre_norm", 1)
    ids = torch.tensor([[5, 6, 7]])
    out = ours(ids, output_hidden_states=True)
    assert out.attentions is None and len(out.hidden_states) == 3
    out = ours(ids, output_attentions=True)
    assert out.hidden_states is None and len(out.attentions) == 2
    out = ours(ids)
    assert out.hidden_states is None and out.attentions is None
    assert len(ours(ids, return_dict=False, **INNER)) == 4


def test_config_asks_for_them_as_in_transformers(load_opt):
    ours = load_opt(tiny_opt(output_hidden_states=True), sequence_length=32)
    ids = torch.tensor([[5, 6, 7]])
    assert len(ours(ids).hidden_states) == 3
    assert ours(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm"])
def test_of_more_rows_than_slots(kind):
    ours, reference = eager_pair(kind, 1, 2)
    inputs = ragged([6, 2, 5, 1, 3])
    with torch.no_grad():
        assert_same_inside(ours(**inputs, **INNER), reference(**inputs, **INNER), inputs["attention_mask"])


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("kind", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_of_each_step_of_generate(kind, tp_degree, options):
    ours, reference = eager_pair(kind, tp_degree, 6)
    inputs = ragged([7, 2, 5])
    mine = ours.generate(**inputs, **SHORT, **INNER, **options)
    theirs = reference.generate(**inputs, **SHORT, **INNER, **options)
    assert_same(mine, theirs)
    beams = options.get("num_beams", 1)
    assert_same_inside(mine, theirs, inputs["attention_mask"].repeat_interleave(beams, dim=0))


def test_of_batches_whose_steps_differ():
    """Of a batch that ended earlier, what is missing is 0."""
    ours, reference = eager_pair("pre_norm", 1, 2)
    inputs = ragged([7, 2, 5])
    free = reference.generate(**inputs, **SHORT).sequences[:, 7:]
    end = int(free[2, 1])  # the second batch ends at its second step
    assert end not in free[:2]
    mine = ours.generate(**inputs, **SHORT, **INNER, eos_token_id=end)
    theirs = reference.generate(**inputs, **SHORT, **INNER, eos_token_id=end)
    for steps, expected, close in (
        (mine.hidden_states, theirs.hidden_states, 1e-2),
        (mine.attentions, theirs.attentions, 1e-5),
    ):
        for step in range(4):
            for tensor, other in zip(steps[step], expected[step], strict=True):
                assert tensor.shape == other.shape
                torch.testing.assert_close(tensor[:2, ..., -1:, :], other[:2, ..., -1:, :], atol=close, rtol=0)
                if step > 1:
                    assert tensor[2].eq(0).all()


def test_by_the_kernels(load_opt):
    source = tiny_opt()
    ours = load_opt(source, eager=False, batch_size=3, sequence_length=64, kv_cache_dtype="f32", tp_degree=2)
    inputs = ragged([20, 2, 5])
    with torch.no_grad():
        theirs = eager_pair("pre_norm", 1)[1](**inputs, **INNER)
    assert_same_inside(ours(**inputs, **INNER), theirs, inputs["attention_mask"])


def test_a_probe_learns_from_them():
    ours, _ = eager_pair("pre_norm", 1)
    hidden = ours(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[1]
    probe = torch.nn.Linear(64, 1)
    probe(hidden).sum().backward()
    assert probe.weight.grad.abs().sum() > 0
