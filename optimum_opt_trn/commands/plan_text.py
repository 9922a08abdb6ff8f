"""A plan for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..hardware import in_units
from ..planning.roofline import REALISTIC_SHARE


if TYPE_CHECKING:
    from ..planning.plan import Plan


_BAR_WIDTH = 60


def describe_plan(plan: Plan, model: str) -> Iterator[str]:
    """Lines about the memory, what fits, and the speed."""
    memory, config = plan.memory, plan.config
    setup, instance = memory.setup, memory.instance
    chips = "this host" if not instance.on_neuron else f"{_count(instance.chips, 'chip')}, {instance.cores} cores"
    yield model
    size, word = (plan.parameters / 1e9, "billion") if plan.parameters >= 1e9 else (plan.parameters / 1e6, "million")
    yield f"{size:.3g} {word} parameters in {config.num_hidden_layers} layers"
    yield (
        f"batch size {setup.batch_size}, {setup.sequence_length} positions, "
        f"weights {setup.weight_dtype or setup.amp}, "
        f"cache {setup.kv_cache_dtype}"
    )
    yield f"{_count(setup.tp_degree, 'rank')} on {instance.name} ({chips})"
    yield ""
    yield from _memory(plan)
    yield ""
    if plan.max_batch_size:
        yield f"largest batch size that fits   {plan.max_batch_size} at {setup.sequence_length} positions"
    if plan.max_sequence_length:
        yield f"longest sequence that fits     {plan.max_sequence_length} positions at batch size {setup.batch_size}"
    yield from _host(plan)
    yield ""
    yield from _speed(plan)


def _memory(plan: Plan) -> Iterator[str]:
    memory, instance = plan.memory, plan.memory.instance
    yield f"{'on each core' if instance.on_neuron else 'in the process'}:"
    for group, size in memory.weights.items():
        yield _row(f"weights: {group}", size)
    yield _row("keys and values", memory.cache)
    yield _row(f"workspace: {max(memory.graphs, key=lambda name: memory.graphs[name])}", memory.workspace)
    if memory.reserve:
        yield _row(f"reserve: {'runtime, code' if instance.on_neuron else 'threads'}", memory.reserve)
    yield _row("total", memory.total)
    yield _row("available", instance.core_bytes)
    yield f"{_row('free', memory.free)}   {'fits' if memory.fits else 'DOES NOT FIT'}"
    yield _bar(plan)
    yield " w weights, k keys and values, s workspace, r reserve"
    if memory.fits and memory.free < memory.scores:
        scores = in_units(memory.scores)
        yield f"Close: a prompt's scores ({scores}) are not counted, the compiler works on them in tiles."
    if not memory.fits and memory.runs:
        yield "It runs in spite of this, but slowly: weights that do not fit are read from the disk again."


def _host(plan: Plan) -> Iterator[str]:
    host = plan.host
    disk, split, trace, load = (in_units(host[name]) for name in ("disk", "split", "trace", "load"))
    yield f"disk                           {disk} for the split checkpoint, in addition to the source"
    total = f"of {in_units(plan.memory.instance.host_bytes)}"
    yield f"host memory                    {split} to split, {load} to load, {total}"
    if host["trace"]:
        yield f"                               {trace} to trace an export, and what the compiler takes"


def _speed(plan: Plan) -> Iterator[str]:
    speed, share = plan.speed, REALISTIC_SHARE
    if speed is None:
        yield "no roofline: the bandwidth of this host's memory is not known"
        return
    yield f"{'roofline, at full length':<32}{'100 %':>10}{f'{100 * share:.0f} %':>10}"
    yield f"{'  decode, ms a step':<32}{speed.decode_seconds * 1e3:>10.1f}{speed.decode_seconds / share * 1e3:>10.1f}"
    rate = speed.decode_tokens_per_second
    yield f"{'  decode, tokens per second':<32}{rate:>10.0f}{rate * share:>10.0f}"
    yield f"{'  prefill, ms':<32}{speed.prefill_seconds * 1e3:>10.0f}{speed.prefill_seconds / share * 1e3:>10.0f}"
    rate = speed.prefill_tokens_per_second
    yield f"{'  prefill, tokens per second':<32}{rate:>10.0f}{rate * share:>10.0f}"


def compare(plans: list[Plan]) -> Iterator[str]:
    """A line for each instance."""
    setup = plans[0].memory.setup
    yield (
        f"{f'batch size {setup.batch_size}, {setup.sequence_length} positions':<32}{'cores':>6}{'ranks':>6}"
        f"{'free on a core':>17}{'largest batch':>15}{f'tokens/s at {100 * REALISTIC_SHARE:.0f} %':>18}"
    )
    for plan in plans:
        memory, speed = plan.memory, plan.speed
        rate = f"{speed.decode_tokens_per_second * REALISTIC_SHARE:.0f}" if speed and memory.fits else "-"
        yield (
            f"  {memory.instance.name:<30}{memory.instance.cores:>6}{memory.setup.tp_degree:>6}"
            f"{in_units(memory.free):>17}{plan.max_batch_size or '-':>15}{rate:>18}"
        )


def _bar(plan: Plan) -> str:
    """Parts of the core's memory as letters, free memory as dots, and the excess behind a bar."""
    memory = plan.memory
    scale = _BAR_WIDTH / memory.instance.core_bytes
    parts = (("w", sum(memory.weights.values())), ("k", memory.cache), ("s", memory.workspace), ("r", memory.reserve))
    drawn, end = "", 0
    for letter, size in parts:
        end += size
        drawn += letter * (min(round(end * scale), 2 * _BAR_WIDTH // 3 + _BAR_WIDTH // 2) - len(drawn))
    return f"[{drawn[:_BAR_WIDTH]:.<{_BAR_WIDTH}}|{drawn[_BAR_WIDTH:]}"


def _row(name: str, size: int) -> str:
    return f"  {name:<30}{in_units(size):>12}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
