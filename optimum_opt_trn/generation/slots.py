"""Who owns which slot of the key/value cache."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Protocol


class SlotOwner(Protocol):
    """Holds a slot for each of its rows.

    Args:
        rows: the slot of each row, all different.
    """

    rows: list[int]


class Slots:
    """The slots of one runtime, and their owners.

    An owner that nobody refers to any more frees its slots. When slots run out all the same, the owners that were
    used least recently are evicted; `check` then raises an error for them.

    Args:
        batch_size: how many slots there are.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        # Slot -> owner, the least recently used first. Weak, so that a dropped owner frees its slots.
        self._owners: dict[int, weakref.ref[SlotOwner]] = {}

    def in_turn(self, keep: Collection[SlotOwner] = ()) -> list[int]:
        """The slots in the order in which they are given away: those that nobody owns, then the least recently used.

        Args:
            keep: owners whose slots are not given away.
        """
        owners = {slot: owner() for slot, owner in self._owners.items()}
        free = [slot for slot in range(self.batch_size) if owners.get(slot) is None]
        # By identity, since owners may compare as equal.
        kept = {id(owner) for owner in keep}
        return free + [slot for slot, owner in owners.items() if owner is not None and id(owner) not in kept]

    def allocate(self, count: int, keep: SlotOwner | None = None) -> list[int]:
        """`count` slots that nobody owns; evicts other owners than `keep` where needed.

        Raises:
            ValueError: if there are not so many slots.
        """
        slots = self.in_turn(() if keep is None else (keep,))[:count]
        if len(slots) < count:
            raise ValueError(
                f"{count} more rows do not fit the batch_size={self.batch_size} that the model was exported for: "
                "export with a larger batch_size, or delete past_key_values that are not needed any more."
            )
        self.free(slots)
        return slots

    def assign(self, owner: SlotOwner) -> None:
        """Makes `owner` the owner of its rows' slots, and the most recently used one."""
        self.free(owner.rows)
        self._owners.update(dict.fromkeys(owner.rows, weakref.ref(owner)))

    def free(self, slots: Iterable[int]) -> None:
        """Takes slots from their owners."""
        for slot in slots:
            self._owners.pop(slot, None)

    def owns(self, owner: SlotOwner) -> bool:
        """Whether `owner` has rows, and still owns the slot of each."""
        owners = [self._owners.get(slot) for slot in owner.rows]
        return bool(owners) and all(ref is not None and ref() is owner for ref in owners)
