"""Inputs, checked and packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.generation.inputs import check_inputs, pack
from optimum_opt_trn.model.sampling import SamplingInputs


CONFIG = OPTNeuronConfig(batch_size=2, sequence_length=8)


@given(
    st.integers(1, 5)
    .flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1))
    .filter(lambda rows: any(map(any, rows))),
    st.integers(0, 3),
    st.data(),
)
def test_a_step_packs_what_is_not_masked(rows, keep, data):
    """Against plain lists: every token with its slot and position, and the last `keep` of each row wanted."""
    mask = torch.tensor(rows)
    ids = torch.arange(4, 4 + mask.numel()).reshape(mask.shape)
    slots = data.draw(st.permutations(range(len(rows))))
    filled = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows))))
    sampling = SamplingInputs.greedy(len(rows))
    sampling.uniforms[:] = torch.arange(len(rows))
    step = pack(ids, mask, slots, filled, keep, sampling)
    tokens, wanted, sampled, ends = [], [], [], []
    for index, (row, real) in enumerate(zip(ids, mask, strict=True)):
        kept = row[real].tolist()
        first = len(tokens)
        tokens += [(token, slots[index], int(filled[index]) + place) for place, token in enumerate(kept)]
        mine = list(range(first, len(tokens)))
        wanted += mine[-keep:] if keep else mine
        if kept:
            sampled.append(float(index))
            ends.append(len(wanted) - 1)
    assert [*zip(step.tokens.tolist(), step.slots.tolist(), step.positions.tolist(), strict=True)] == tokens
    assert step.wanted.tolist() == wanted
    assert step.sampling.uniforms.tolist() == sampled
    assert step.sampled.tolist() == ends
    assert step.tokens.dtype == torch.int32 and step.slots.dtype == step.positions.dtype == torch.int64
    counts = [sum(row) for row in rows]
    assert [(slot, tokens.stop - tokens.start) for slot, tokens in step.runs] == [
        (slot, count) for slot, count in zip(slots, counts, strict=True) if count
    ]
    assert step.longest == max(counts)


def test_the_mask_of_new_columns():
    ids, past = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[False, True], [True, True]])
    assert check_inputs(ids, None, 10, CONFIG).all()
    assert check_inputs(ids, None, 10, CONFIG, past).shape == (2, 2)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert check_inputs(ids, mask, 10, CONFIG, past).tolist() == [[True, False], [True, True]]
    # Ids behind the mask are nobody's.
    assert check_inputs(torch.tensor([[-100, 5]]), torch.tensor([[0, 1]]), 10, CONFIG).tolist() == [[False, True]]


BAD = {
    "floats": ((torch.ones(1, 2), None), "whole numbers"),
    "one dimension": ((torch.ones(2, dtype=torch.long), None), "shape"),
    "no rows": ((torch.ones(0, 2, dtype=torch.long), None), "empty"),
    "a masked row": ((torch.ones(2, 2, dtype=torch.long), torch.tensor([[1, 0], [0, 0]])), "row 1 is empty"),
    "too long": ((torch.ones(1, 9, dtype=torch.long), None), "9 tokens.*sequence_length=8"),
    "too long with its past": (
        (torch.ones(1, 6, dtype=torch.long), None, torch.ones(1, 3, dtype=torch.bool)),
        "9 tokens.*sequence_length=8",
    ),
    "an id": ((torch.tensor([[1, 10]]), None), r"Token id 10 \(row 0, place 1\).*0 to 9"),
    "a mask's shape": (
        (torch.ones(1, 2, dtype=torch.long), torch.ones(1, 3)),
        r"\(1, 3\), but input_ids has \(1, 2\)",
    ),
    "a mask without its past": (
        (torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool)),
        r"past_key_values make \(1, 5\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_name_value_and_limit(bad):
    (ids, mask, *past), message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        check_inputs(ids, mask, 10, CONFIG, *past)


def test_padding_takes_no_room():
    ids, mask = torch.full((1, 30), 1), torch.zeros(1, 30)
    mask[:, -8:] = 1
    assert int(check_inputs(ids, mask, 10, CONFIG).sum()) == 8
