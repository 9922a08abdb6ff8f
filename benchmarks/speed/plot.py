"""The plot: milliseconds a step of every peer and of ours beside it, and the least that either can take."""

from __future__ import annotations

import statistics
from pathlib import Path

from .records import Records


OURS, PEER, FLOOR = "#0072b2", "#bbbbbb", "#d55e00"
# A page of documentation shows two panels next to each other.
COLUMNS, DPI = 2, 110


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
    shown = [(shape, batch) for shape in shapes for batch in batches]
    columns = min(COLUMNS, len(batches))
    rows = -(-len(batches) // columns) * len(shapes)
    tallest = max(len(records.select(shape=shape, figure="load", batch=1)) for shape in shapes)
    figure = Figure(figsize=(4.6 * columns + 0.8, (0.28 * max(tallest, 6) + 1.1) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    # The legend has this name, so that it is not repeated for every pair.
    ours = next((record.contender for record in found if record.contender.startswith("ours")), "ours")
    for panel, (shape, batch) in zip(panels, shown, strict=False):
        _panel(panel, records, shape, batch, ours)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    handles = [Patch(color=OURS), Patch(color=PEER), Line2D([], [], color=FLOOR)]
    labels = [f"{ours}, in turns with the peer below it", "peer", "bytes to read / bandwidth of the probe"]
    where = {"loc": "outside lower center", "ncols": 1 if columns == 1 else 3}
    figure.legend(handles, labels, frameon=False, fontsize=8, **where)
    figure.suptitle("Decode, ms a step (medians; each pair measured in turns)")
    figure.savefig(file, format=file.suffix[1:], dpi=DPI)


def _panel(panel, records: Records, shape: str, batch: int, in_legend: str) -> None:
    """Draws one shape and batch size; bars of the contender `in_legend` have no name of their own."""
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
            names.append("" if record.contender == in_legend else record.contender)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.set_xlabel("ms a step", fontsize=8)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
