"""A plan as a chart: memory against the limit, and tokens per second against the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..instances import GiB
from ..roofline import REALISTIC_SHARE, decode_curve


if TYPE_CHECKING:
    from ..planning import Plan


FORMATS = (".png", ".svg")


def draw(plan: Plan, file: str) -> None:
    """Writes the chart of `plan` to `file`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if `file` is neither a .png nor a .svg.
        OSError: if it cannot be written.
    """
    if Path(file).suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {file}: choose a name that ends with {' or '.join(FORMATS)}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib ({error}): pip install matplotlib") from None

    memory, setup = plan.memory, plan.memory.setup
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{setup.weights} weights, {setup.sequence_length} positions, {setup.tp_degree} ranks, {memory.instance.name}"
    )

    bottom = 0.0
    parts = {**memory.weights, "keys and values": memory.cache}
    parts |= {"workspace": memory.workspace, "reserve": memory.reserve}
    for name, size in parts.items():
        if size:
            left.bar([f"batch size {setup.batch_size}"], [size / GiB], bottom=bottom, width=0.5, label=name)
            bottom += size / GiB
    limit = memory.instance.core_bytes / GiB
    left.axhline(limit, color="black", linestyle="--", label=f"limit, {limit:.3g} GiB")
    left.set_xlim(-1, 1)
    left.set_ylabel("GiB of a core" if memory.instance.on_neuron else "GiB of the process")
    # Below the bars' order: the first is at the bottom.
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], fontsize="small", loc="center right")
    left.set_title("fits" if memory.fits else "does not fit")

    sizes = _sizes(max(plan.max_batch_size, setup.batch_size))
    rates = decode_curve(plan.config, plan.memory, sizes)
    if rates:
        right.plot(sizes, rates, marker="o", label="100 % of the roofline")
        realistic = [rate * REALISTIC_SHARE for rate in rates]
        right.plot(sizes, realistic, marker="o", label=f"{100 * REALISTIC_SHARE:.0f} %")
        right.axvline(plan.max_batch_size, color="black", linestyle="--", label="largest that fits")
        right.set(xlabel="batch size", ylabel="tokens per second, decode", ylim=(0, None))
        right.legend(fontsize="small")
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no roofline for this host", ha="center")
    figure.savefig(file)


def _sizes(largest: int) -> list[int]:
    """Batch sizes from 1 to `largest`, at most some twenty."""
    return sorted({*range(1, largest + 1, -(-largest // 20)), largest})
