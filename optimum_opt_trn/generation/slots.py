"""The slots of the key/value cache, and the transformers `Cache` through which callers hold some of them.

Keys and values stay where the graphs keep them. A `SlotCache` knows which slots its rows live in, and which columns
of its callers' `input_ids` are in them; what lies behind a row's last token is never read, so that forgetting tokens
costs nothing, and a call that failed half-way leaves a cache as it was.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..targets import Runtime


class SlotCache(Cache):
    """What `past_key_values` is: the slots of some rows. Made by `Slots.lend`.

    A transformers `Cache` in all that generation needs of one: length, `crop`, `reset`, `reorder_cache`,
    `batch_select_indices`, `batch_repeat_interleave`, `copy.deepcopy`. The tensors themselves are the runtime's.

    Args:
        slots: where the slots are from.
        rows: the slot of each row.
    """

    is_compileable = False
    is_sliding = [False]

    def __init__(self, slots: Slots, rows: list[int]):
        super().__init__(layers=[])
        self._slots = slots
        self.rows = rows
        self._columns = torch.zeros(len(rows), 0, dtype=torch.bool)

    @property
    def columns(self) -> Tensor:
        """bool `(rows, width)`: which of the columns of `input_ids` seen so far are tokens, in the cache."""
        return self._columns

    @property
    def lengths(self) -> Tensor:
        """int32 `(rows,)`: how many positions of each slot are filled."""
        return self._columns.sum(-1, dtype=torch.int32)

    def append(self, mask: Tensor) -> None:
        """Says that new columns, bool `(rows, n)`, have been written."""
        self._columns = torch.cat([self._columns, mask], dim=1)

    def remasked(self, mask: Tensor) -> Tensor:
        """`columns` without the tokens that the caller's mask does not count any more; changes nothing, see `keep`.

        Args:
            mask: 1 (or True) for tokens that count, `(rows, n)`. Of n columns and those held, the fewer are compared
                and returned.

        Raises:
            ValueError: if the mask counts columns that it did not before, or if a token that it still counts follows
                one that it does not: what came after was computed with it.
        """
        held, mask = self._columns[:, : mask.shape[1]], mask[:, : self._columns.shape[1]].bool()
        # True from the first forgotten token on.
        after = (held & ~mask).cumsum(-1) > 0
        if bool((mask & (after | ~held)).any()):
            raise ValueError(
                "attention_mask differs from the one that the tokens in past_key_values were encoded with: pass the "
                "same columns, or leave past_key_values out and encode the prompt again."
            )
        return mask

    def keep(self, columns: Tensor) -> None:
        """Forgets all but `columns`, bool `(rows, n)`: the first n of what `remasked` gave."""
        self._columns = columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that need not be passed again, padding included as in transformers."""
        return self._columns.shape[1]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens that a slot holds."""
        return self._slots.sequence_length

    @property
    def max_cache_len(self) -> int:
        return self._slots.sequence_length

    @property
    def max_batch_size(self) -> int:
        return len(self.rows)

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    def crop(self, max_length: int) -> None:
        """Forgets all columns but the first `max_length`; if that is negative, so many of the last."""
        width = self.get_seq_length()
        self._columns = self._columns[:, : max_length if max_length >= 0 else max(width + max_length, 0)]

    def reset(self) -> None:
        self.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as row `beam_idx[i]`; integers `(rows,)`."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` alone, in this order."""
        self._select(torch.arange(len(self.rows))[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotCache:
        self._slots.check(self)
        copied = self._slots.lend(len(self.rows), keep=self)
        self._slots.copy(dict(zip(copied.rows, self.rows, strict=True)), self.lengths)
        copied._columns = self._columns.clone()
        return copied

    def _select(self, picked: list[int]) -> None:
        self._slots.check(self)
        old, lengths = self.rows, self.lengths
        # The first row that goes on in a slot gets it; the others get copies, first of all in slots that nobody needs.
        wanted = [old[row] for row in picked]
        spare = [slot for slot in old if slot not in wanted]
        missing = len(wanted) - len(set(wanted)) - len(spare)
        if missing > 0:
            spare += self._slots.take(missing, keep=self)
        rows: list[int] = []
        copies: dict[int, int] = {}
        for slot in wanted:
            if slot in rows:
                copies[spare[-1]] = slot
                slot = spare.pop()
            rows.append(slot)
        # An interrupted copy would leave rows that are no one's: until it is done, there are none.
        self.rows = []
        self._slots.copy(copies, lengths)
        self.rows, self._columns = rows, self._columns[picked]
        self._slots.assign(self, freed=spare)

    def __getitem__(self, layer_idx: int) -> Any:
        raise NotImplementedError("Keys and values of a SlotCache are on the device, and cannot be read.")

    def __iter__(self) -> Any:
        raise NotImplementedError("Keys and values of a SlotCache are on the device, and cannot be read.")

    def __len__(self) -> int:
        raise NotImplementedError("A SlotCache has no layers to count: len(cache) means nothing here.")

    def __bool__(self) -> bool:
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The graphs write a SlotCache; it cannot be updated from the host.")

    def __repr__(self) -> str:
        return f"SlotCache(rows={len(self.rows)}, seq_length={self.get_seq_length()}, slots={self.rows})"


class Slots:
    """Who holds which of a runtime's slots.

    A cache that nobody refers to any more gives its slots back. When they run out all the same, the caches that were
    not used for longest lose theirs; using one of those raises an error.

    Args:
        runtime: whose slots.
        batch_size: how many there are.
        sequence_length: tokens that each holds.
    """

    def __init__(self, runtime: Runtime, batch_size: int, sequence_length: int):
        self.runtime = runtime
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        # In the order of their last use: slot -> holder.
        self._holders: dict[int, weakref.ref[SlotCache]] = {}

    def lend(self, rows: int, keep: SlotCache | None = None) -> SlotCache:
        """A cache of `rows` empty slots; of the caches that hold some, `keep` loses none.

        Raises:
            ValueError: if there are not so many slots.
        """
        cache = SlotCache(self, self.take(rows, keep))
        self.assign(cache)
        return cache

    def take(self, count: int, keep: SlotCache | None = None) -> list[int]:
        """Slots that are nobody's, made so if need be; see `lend`."""
        held = {slot for slot, holder in self._holders.items() if holder() is not None}
        free = [slot for slot in range(self.batch_size) if slot not in held]
        for slot, holder in list(self._holders.items()):
            if len(free) >= count:
                break
            if slot in held and holder() is not keep:
                free.append(slot)
        if len(free) < count:
            raise ValueError(
                f"{count} more rows do not fit the batch_size={self.batch_size} that the model was exported for: "
                "export with a larger batch_size, or let go of past_key_values that are not needed any more."
            )
        for slot in free[:count]:
            self._holders.pop(slot, None)
        return free[:count]

    def assign(self, cache: SlotCache, freed: list[int] | None = None) -> None:
        """Notes that `cache` holds its rows' slots, is in use, and that `freed` are nobody's."""
        for slot in [*(freed or ()), *cache.rows]:
            self._holders.pop(slot, None)
        self._holders.update(dict.fromkeys(cache.rows, weakref.ref(cache)))

    def seize(self, rows: list[int]) -> None:
        """Takes slots from whoever holds them, for a caller who counts slots itself."""
        for slot in rows:
            self._holders.pop(slot, None)

    def check(self, cache: SlotCache) -> None:
        """Raises ValueError unless `cache` still holds its slots, in this runtime."""
        if cache._slots is not self:
            raise ValueError("past_key_values belongs to another model: pass what this one returned.")
        holders = [self._holders.get(slot) for slot in cache.rows]
        if len(cache.rows) != len(cache.columns) or any(h is None or h() is not cache for h in holders):
            raise ValueError(
                f"past_key_values has lost its slots to another call, for there are but {self.batch_size} (the "
                "batch_size that the model was exported for): leave it out and encode the prompt again, or export "
                "with a larger batch_size."
            )

    def copy(self, copies: dict[int, int], lengths: Tensor) -> None:
        """Copies slots, target -> source, of which at most the longest of `lengths` is filled."""
        if copies and int(lengths.max()):
            sources = torch.arange(self.batch_size, dtype=torch.int32)
            sources[list(copies)] = torch.tensor(list(copies.values()), dtype=torch.int32)
            self.runtime.copy(sources, int(lengths.max()))
