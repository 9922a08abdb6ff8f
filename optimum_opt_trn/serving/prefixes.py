"""What slots hold after their requests: prompts that begin alike copy it instead of computing it again."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..generation.slots import SlotOwner, Slots


# A shorter beginning is computed again: a copy moves the rows of every layer.
SHORTEST_PREFIX = 16


class Holder(SlotOwner, Protocol):
    """Has a slot, and tokens in it from position 0 on."""

    @property
    def cached(self) -> list[int]: ...


@dataclass(eq=False)
class Held:
    """A slot whose request has ended, with the tokens that are still in it.

    Args:
        rows: the slot.
        cached: its tokens.
        pinned: whether no request may overwrite them.
    """

    rows: list[int]
    cached: list[int]
    pinned: bool = field(default=False)


class Prefixes:
    """The slots of one engine that hold tokens of requests that have ended.

    `Held` objects own their slots as other callers own theirs: whoever needs a slot takes the least recently used.

    Args:
        slots: of the engine.
    """

    def __init__(self, slots: Slots):
        self.slots = slots
        self._held: dict[int, Held] = {}

    def hold(self, slot: int, tokens: list[int], pinned: bool = False) -> None:
        """Notes what a slot holds from now on."""
        held = Held([slot], tokens, pinned)
        self._held[slot] = held
        self.slots.assign(held)

    def touch(self, slot: int) -> None:
        """Notes that what a slot holds was used."""
        if slot in self._held:
            self.slots.assign(self._held[slot])

    def held(self) -> list[Held]:
        """Those that still own their slots."""
        self._held = {slot: held for slot, held in self._held.items() if self.slots.owns(held)}
        return list(self._held.values())

    def pinned(self) -> list[Held]:
        """Those that no request may overwrite."""
        return [held for held in self.held() if held.pinned]

    def unpin(self) -> None:
        """Lets requests overwrite all."""
        for held in self.held():
            held.pinned = False

    def forget(self, slot: int) -> list[int]:
        """The tokens that a slot holds, which is given away."""
        held = self._held.pop(slot, None)
        return held.cached if held is not None and self.slots.owns(held) else []

    def choose_slot(self, tokens: list[int], keep: Collection[SlotOwner]) -> int | None:
        """The slot for a new sequence; None if all are in use.

        Slots whose whole contents it begins with, as a conversation that goes on does; otherwise the one that is free
        or was not used for longest.

        Args:
            tokens: the sequence.
            keep: owners whose slots are in use.
        """
        given_away = self.slots.in_turn([*keep, *self.pinned()])
        for held in self.held():
            length = len(held.cached)
            if length >= SHORTEST_PREFIX and held.rows[0] in given_away and tokens[:length] == held.cached:
                return held.rows[0]
        return given_away[0] if given_away else None


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # a[:low] is common, a[:high] is not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def longest(tokens: list[int], holders: Iterable[Holder]) -> tuple[int, int | None]:
    """How many tokens the holder with the longest common beginning has, and its slot; (0, None) if none has enough."""
    best: tuple[int, int | None] = (SHORTEST_PREFIX - 1, None)
    for holder in holders:
        length = common(tokens, holder.cached)
        if length > best[0]:
            best = length, holder.rows[0]
    return best if best[1] is not None else (0, None)
