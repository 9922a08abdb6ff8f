"""What slots hold: the longest common beginning, and whose slot is given away next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optimum_opt_trn.generation.slots import Slots
from optimum_opt_trn.serving.prefixes import SHORTEST_PREFIX, Held, Prefixes, common, longest


tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, tokens)
def test_common_beginnings(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(a, b) == expected


@given(tokens, st.lists(tokens, max_size=5))
def test_the_longest_one(asked, others):
    holders = [Held([slot], other) for slot, other in enumerate(others)]
    length, slot = longest(asked, holders)
    best = max((common(asked, other) for other in others), default=0)
    if best < SHORTEST_PREFIX:
        assert (length, slot) == (0, None)
    else:
        assert length == best == common(asked, others[slot])


def test_whose_slot_is_given_away():
    slots = Slots(4)
    prefixes = Prefixes(slots)
    sequences = {slot: [slot] * (20 + slot) for slot in (2, 0, 3)}
    for slot, sequence in sequences.items():
        prefixes.hold(slot, sequence)
    busy = Held([1], [])
    assert prefixes.choose_slot([9], []) == 1, "nobody has it"
    slots.assign(busy)
    assert prefixes.choose_slot([9], [busy]) == 2, "the least recently used"
    prefixes.touch(2)
    assert prefixes.choose_slot([9], [busy]) == 0
    assert prefixes.choose_slot([3] * 30, [busy]) == 3, "a conversation that goes on"
    assert prefixes.choose_slot([3] * 22, [busy]) == 0, "a part of what is there is not"
    prefixes.hold(0, sequences[0], pinned=True)
    assert prefixes.choose_slot([9], [busy]) == 3
    assert [held.rows for held in prefixes.pinned()] == [[0]]
    prefixes.unpin()
    assert prefixes.pinned() == []
    slots.allocate(3, keep=busy)  # another call
    assert prefixes.held() == []
    prefixes.hold(3, sequences[3])
    assert prefixes.forget(3) == sequences[3] and prefixes.forget(3) == []
