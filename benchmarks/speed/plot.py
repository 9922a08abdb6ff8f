"""The plot: milliseconds a step of every peer and of ours beside it, and the least that either can take."""

from __future__ import annotations

import statistics
from pathlib import Path

from .records import Records


OURS, PEER, FLOOR = "#0072b2", "#bbbbbb", "#d55e00"


def draw(records: Records, file: Path) -> None:
    """Bars for each group at the shortest context; a panel for each shape and batch size.

    The kind of file is that of the name. Nothing without records of decoding, or without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError:
        return
    found = records.select(figure="decode")
    shapes = list(dict.fromkeys(record.shape for record in found))
    batches = sorted({record.batch for record in found})
    if not found:
        return
    tallest = max(len(records.select(shape=shape, figure="load", batch=1)) for shape in shapes)
    size = (4.2 * len(batches) + 1.5, (0.28 * max(tallest, 6) + 1.0) * len(shapes))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(shapes), len(batches), squeeze=False)
    for row, shape in zip(panels, shapes, strict=True):
        for panel, batch in zip(row, batches, strict=True):
            _panel(panel, records, shape, batch)
    handles = [Patch(color=OURS), Patch(color=PEER), Line2D([], [], color=FLOOR)]
    labels = ["ours, beside the peer below it", "peer", "bytes to read / bandwidth of the probe"]
    columns = 1 if len(batches) == 1 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.suptitle("Decode, ms a step (medians; each pair measured in turns)")
    figure.savefig(file, format=file.suffix[1:], dpi=150)


def _panel(panel, records: Records, shape: str, batch: int) -> None:
    found = records.select(shape=shape, figure="decode", batch=batch)
    shortest = min((record.length for record in found), default=0)
    found = [record for record in found if record.length == shortest]
    panel.set_title(
        f"{shape}, batch {batch}, context {shortest}" if found else f"{shape}, batch {batch}: not measured"
    )
    names, height = [], 0.8
    for group in dict.fromkeys(record.group for record in found):
        for record in (record for record in found if record.group == group):
            y, ours = len(names), record.contender.startswith("ours")
            low, high = (abs(record.median - end) * 1e3 for end in record.quartiles)
            spread = {"xerr": [[low], [high]], "error_kw": {"lw": 0.8}}
            panel.barh(y, record.median * 1e3, height, color=OURS if ours else PEER, **spread)
            floor = statistics.median(record.floors) * 1e3
            panel.plot([floor, floor], [y - height / 2, y + height / 2], color=FLOOR)
            names.append(record.contender)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
