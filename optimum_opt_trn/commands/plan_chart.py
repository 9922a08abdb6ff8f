"""A plan as a chart: memory against the limit, and tokens per second against the batch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..hardware import unit_of
from ..planning.memory import plan_memory
from ..planning.roofline import REALISTIC_SHARE, decode_curve


if TYPE_CHECKING:
    from ..planning.plan import Plan


FORMATS = (".png", ".svg")


def draw(plan: Plan, model: str, file: str) -> None:
    """Writes the chart of the `plan` of `model` to `file`.

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
        raise ImportError(f"--plot needs matplotlib ({error}): pip install 'optimum-opt-trn[plot]'") from None

    memory, setup = plan.memory, plan.memory.setup
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{_name(model)}: {setup.weight_dtype or setup.amp} weights, {setup.sequence_length} positions, "
        f"{setup.tp_degree} rank{'' if setup.tp_degree == 1 else 's'}, {memory.instance.name}"
    )

    # The requested batch size, and the sizes on both sides of the limit.
    shown = sorted({1, setup.batch_size, plan.max_batch_size or 1, plan.max_batch_size + 1})
    plans = [plan_memory(plan.config, replace(setup, batch_size=size), memory.instance) for size in shown]
    unit, unit_name = unit_of(max(p.total for p in plans))
    bottoms = [0.0] * len(plans)
    for name in (*memory.weights, "keys and values", "workspace", "reserve"):
        own = {"keys and values": "cache"}.get(name, name)
        heights = [(p.weights[name] if name in p.weights else getattr(p, own)) / unit for p in plans]
        left.bar([str(size) for size in shown], heights, bottom=bottoms, width=0.6, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    limit = memory.instance.core_bytes / unit
    left.axhline(limit, color="black", linestyle="--", label=f"limit, {limit:.3g} {unit_name}")
    left.set(xlabel="batch size", ylabel=f"{unit_name} of {'a core' if memory.instance.on_neuron else 'the process'}")
    handles, labels = left.get_legend_handles_labels()  # in the order of the bars, from the top
    left.legend(handles[::-1], labels[::-1], fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

    sizes = _sizes(max(plan.max_batch_size, setup.batch_size))
    rates = decode_curve(plan.config, plan.memory, sizes)
    if rates:
        right.plot(sizes, rates, marker="o", label="100 % of the roofline")
        realistic = [rate * REALISTIC_SHARE for rate in rates]
        right.plot(sizes, realistic, marker="o", label=f"{100 * REALISTIC_SHARE:.0f} %")
        right.axvline(
            plan.max_batch_size, color="black", linestyle="--", label=f"largest that fits, {plan.max_batch_size}"
        )
        right.set(xlabel="batch size", ylabel="tokens per second, decode", ylim=(0, None))
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend(fontsize="small")
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no roofline for this host", ha="center")
    figure.savefig(file)


def _name(model: str) -> str:
    """What a picture calls a model: its id on the Hub, or the last part of a path that has a name."""
    path = Path(model)
    if not path.exists():
        return model
    path = path.resolve()
    return (path.parent if path.is_file() else path).name


def _sizes(largest: int) -> list[int]:
    """Batch sizes from 1 to `largest`, at most some twenty."""
    return sorted({*range(1, largest + 1, -(-largest // 20)), largest})
