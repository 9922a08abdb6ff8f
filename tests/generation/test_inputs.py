"""Checks and compaction of inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.generation.inputs import check_inputs, compact


CONFIG = OPTNeuronConfig(batch_size=2, sequence_length=8)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)))
def test_compaction_drops_what_is_masked(rows):
    mask = torch.tensor(rows)
    ids = torch.arange(4, 4 + mask.numel()).reshape(mask.shape)
    tokens, lengths = compact(ids, mask)
    assert tokens.dtype == lengths.dtype == torch.int32
    assert tokens.shape == (len(rows), max(map(sum, rows)))
    for row, real, compacted, length in zip(ids, mask, tokens, lengths, strict=True):
        assert compacted.tolist() == row[real].tolist() + [0] * (tokens.shape[1] - int(length))


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
