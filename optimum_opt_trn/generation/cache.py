"""What `past_key_values` is: a transformers `Cache` over slots of the engine.

Keys and values stay on the device. A `SlotCache` knows which slots its rows live in, and which columns of its callers'
`input_ids` are in them. What lies behind a row's last token is never read. So forgetting tokens costs nothing, and a
call that failed half-way leaves a cache as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import logging

from .engine import Engine
from .transformers_versions import columns_after_crop


logger = logging.get_logger(__name__)


class SlotCache(Cache):
    """Rows of `input_ids` in slots of the engine; it gets its slots with its first step.

    Serves everything that generation needs of a transformers `Cache`: length, `crop`, `reset`, `reorder_cache`,
    `batch_select_indices`, `batch_repeat_interleave`, `copy.deepcopy`. The tensors themselves are the runtime's.

    Args:
        engine: whose slots they are.
        rows: how many rows.
    """

    is_compileable = False
    is_sliding = [False]
    is_linear = [False]
    is_croppable = True

    def __init__(self, engine: Engine, rows: int):
        super().__init__(layers=[])
        self.engine = engine
        self.rows: list[int] = []
        self._columns = torch.zeros(rows, 0, dtype=torch.bool)
        self._lengths = torch.zeros(rows, dtype=torch.int64)

    @property
    def columns(self) -> Tensor:
        """bool `(rows, width)`: which of the columns of `input_ids` seen so far are tokens, in the cache."""
        return self._columns

    @property
    def lengths(self) -> Tensor:
        """int64 `(rows,)`: how many positions of each slot are filled."""
        return self._lengths

    def append(self, mask: Tensor) -> None:
        """Notes that new columns, bool `(rows, n)`, are in the cache."""
        self._columns = torch.cat([self._columns, mask], dim=1)
        self._lengths = self._lengths + mask.sum(-1)

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
        self._lengths = columns.sum(-1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that need not be passed again, padding included as in transformers."""
        return self._columns.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a slot holds; transformers 5's name."""
        return self.engine.sequence_length

    def activate_past_recording(self) -> None:
        """Does nothing: every column can be forgotten again."""

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens that a slot holds."""
        return self.engine.sequence_length

    @property
    def max_cache_len(self) -> int:
        return self.engine.sequence_length

    @property
    def max_batch_size(self) -> int:
        return len(self._columns)

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    def crop(self, max_length: int) -> None:
        """Forgets all columns but the first `max_length`; if that is negative, so many of the last."""
        self.keep(self._columns[:, : columns_after_crop(self.get_seq_length(), max_length)])

    def reset(self) -> None:
        self.keep(self._columns[:, :0])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on as row `beam_idx[i]`; integers `(rows,)`."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices`, in this order."""
        self._select(torch.arange(len(self._columns))[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select([row for row in range(len(self._columns)) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotCache:
        with self.engine.lock:
            self.check(self.engine)
            copied = SlotCache(self.engine, len(self._columns))
            if self.is_initialized:
                copied.rows = self.engine.slots.allocate(len(self.rows), keep=self)
                self.engine.slots.assign(copied)
                self.engine.copy(dict(zip(copied.rows, self.rows, strict=True)), int(self.lengths.max()))
            copied.keep(self._columns.clone())
            return copied

    def check(self, engine: Engine) -> None:
        """Raises ValueError unless this cache is of `engine`, and still owns its slots."""
        if self.engine is not engine:
            raise ValueError("past_key_values belongs to another model: pass what this one returned.")
        engine.check(self)

    def _select(self, picked: list[int]) -> None:
        with self.engine.lock:
            self.check(self.engine)
            if not self.is_initialized:
                self.rows = []
                self.keep(self._columns[picked])
                return
            old, length = self.rows, int(self.lengths.max())
            # The first row that goes on in a slot keeps it. The others get copies, first in slots that no row needs.
            wanted = [old[row] for row in picked]
            spare = [slot for slot in old if slot not in wanted]
            missing = len(wanted) - len(set(wanted)) - len(spare)
            if missing > 0:
                spare += self.engine.slots.allocate(missing, keep=self)
            rows: list[int] = []
            copies: dict[int, int] = {}
            for slot in wanted:
                if slot in rows:
                    copies[spare[-1]] = slot
                    slot = spare.pop()
                rows.append(slot)
            # Until the copy is done this cache has no rows: an interrupted copy leaves slots that hold anything.
            self.rows = []
            self.engine.copy(copies, length)
            self.rows = rows
            self.keep(self._columns[picked])
            self.engine.slots.free(spare)
            self.engine.slots.assign(self)

    def __getitem__(self, layer_idx: int) -> Any:
        raise NotImplementedError("The keys and values of a SlotCache are on the device, and cannot be read.")

    def __iter__(self) -> Any:
        raise NotImplementedError("The keys and values of a SlotCache are on the device, and cannot be read.")

    def __len__(self) -> int:
        raise NotImplementedError(
            "A SlotCache has no layers on the host to count: past_key_values.get_seq_length() counts its columns, "
            "config.num_hidden_layers the layers."
        )

    def __bool__(self) -> bool:
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The graphs write a SlotCache; it cannot be updated from the host.")

    def __repr__(self) -> str:
        return f"SlotCache(rows={len(self._columns)}, seq_length={self.get_seq_length()}, slots={self.rows})"


def own_cache(past: Cache | None, engine: Engine, rows: int) -> SlotCache:
    """The caller's `past_key_values`, or a new cache if there is none.

    Raises:
        ValueError: for another model's cache, one that has lost its slots, or another number of rows.
    """
    if past is None:
        return SlotCache(engine, rows)
    if not isinstance(past, SlotCache):
        if not isinstance(past, Cache) or past.get_seq_length():
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, whose keys and values are not on the device: pass "
                "what this model returned, or leave it out."
            )
        logger.warning_once(
            f"past_key_values is an empty {type(past).__name__}, which this model cannot fill: results are the "
            "same, but pass the past_key_values that it returns to have only new tokens encoded."
        )
        return SlotCache(engine, rows)
    past.check(engine)
    if len(past.columns) != rows:
        raise ValueError(f"past_key_values holds {len(past.columns)} rows, and input_ids has {rows}.")
    return past
