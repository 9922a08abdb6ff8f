"""What was measured: every run's seconds with what the probe saw around it, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Record:
    """One figure of one contender, in one group of contenders that were measured in turns.

    Args:
        shape, group, contender: names.
        figure: `decode` (runs are seconds per step), `prefill` (seconds to the first token, loaded and warm), `start`
            (of the process, with its imports), `load`, `first` (the cold prompt of 32 after it), `convert`, `compile`,
            or `resident`, `anonymous` (bytes).
        batch: rows.
        length: tokens of the prompt, which for `decode` is the context that steps begin with; for `compile` the
            number of layers.
        runs: one number each.
        quiet: as runs, taken just before them without the neighbours; empty if there are none.
        bandwidths: for each run, bytes per second that the probe saw before and after it, their mean.
        bytes: for each run, those that a step has to read.
    """

    shape: str
    group: str
    contender: str
    figure: str
    batch: int = 1
    length: int = 0
    runs: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def slowdown(self) -> float | None:
        """How many times its quiet time a run takes beside the neighbours; of medians."""
        return self.median / statistics.median(self.quiet) if self.quiet else None

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.runs)

    @property
    def shares(self) -> list[float]:
        """Of the probe's bandwidth, in each run."""
        timed = zip(self.bytes, self.runs, self.bandwidths, strict=True)
        return [size / seconds / bandwidth for size, seconds, bandwidth in timed]

    @property
    def floors(self) -> list[float]:
        """Seconds that a step takes at least, at the probe's bandwidth, in each run."""
        return [size / bandwidth for size, bandwidth in zip(self.bytes, self.bandwidths, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and third; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


class Records:
    """All of them, to be looked up."""

    def __init__(self, records: Iterable[Record] = ()):
        self.all = list(records)

    def add(self, *record: Record) -> None:
        self.all += record

    def select(self, **wanted: Any) -> list[Record]:
        return [r for r in self.all if all(getattr(r, name) == value for name, value in wanted.items())]

    def one(self, **wanted: Any) -> Record | None:
        """The only such record; None if there is none."""
        found = self.select(**wanted)
        if len(found) > 1:
            raise ValueError(f"{len(found)} records are {wanted}.")
        return found[0] if found else None

    def ratio(self, base: str, contender: str, **wanted: Any) -> float | None:
        """How many times the median of `base` the median of `contender` is, in a group; None if one is missing."""
        mine, other = (self.one(contender=name, **wanted) for name in (base, contender))
        return None if mine is None or other is None else other.median / mine.median

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.all]
