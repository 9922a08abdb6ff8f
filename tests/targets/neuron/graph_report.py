"""What a device would have to do for one graph, read from its HLO; printed by check_with_nxdsim.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any


# XLA's names and sizes in bytes of element types (xla_data.proto, PrimitiveType).
TYPES = {
    1: ("pred", 1),
    2: ("s8", 1),
    4: ("s32", 4),
    5: ("s64", 8),
    6: ("u8", 1),
    8: ("u32", 4),
    9: ("u64", 8),
    10: ("f16", 2),
    11: ("f32", 4),
    12: ("f64", 8),
    16: ("bf16", 2),
}
WIDE = [number for number, (name, _) in TYPES.items() if name in ("s64", "u64")]
COLLECTIVES = ("all-reduce", "all-gather")
UPDATES = ("scatter", "dynamic-update-slice")
# They name tensors, and move nothing.
NAMES = ("parameter", "tuple", "get-tuple-element")


@dataclass
class GraphReport:
    """One graph of one rank.

    Args:
        instructions: how many the graph has.
        depth: the longest chain of instructions that need each other's results.
        updates: writes to the cache, by opcode.
        whole_cache: other operations whose result has the shape of a layer's keys or values, by opcode.
        whole_cache_bytes: the sum of these results.
        collectives: by opcode and dtype, how many and their bytes.
        waiting_dots: products that need the result of a write to the cache.
        writes_in_chain: the most writes to the cache that need each other's results.
        sorted: the longest row that is sorted.
        wide: instructions with 64-bit integers, by opcode; those of functions that instructions call included.
    """

    instructions: int = 0
    depth: int = 0
    updates: Counter[str] = field(default_factory=Counter)
    whole_cache: Counter[str] = field(default_factory=Counter)
    whole_cache_bytes: int = 0
    collectives: dict[str, list[int]] = field(default_factory=dict)
    waiting_dots: int = 0
    writes_in_chain: int = 0
    sorted: int = 0
    wide: Counter[str] = field(default_factory=Counter)


def report_graph(module: Any, cache_shape: tuple[int, ...]) -> GraphReport:
    """Reads an HloModuleProto; `cache_shape` is that of a layer's keys of one rank."""
    computations = {computation.id: computation for computation in module.computations}
    entry = computations[module.entry_computation_id]
    report, depth, writes = GraphReport(), {}, {}
    for instruction in _in_order(entry):
        opcode = _opcode(instruction, computations)
        needed = instruction.operand_ids
        dtypes = [TYPES.get(shape.element_type, ("tuple", 0)) for shape in _shapes(instruction)]
        sizes = [tuple(shape.dimensions) for shape in _shapes(instruction)]
        update = opcode in UPDATES and sizes[0] == cache_shape
        # Transposes that keep every dimension in its place are left for XLA to drop.
        moves = opcode not in NAMES and list(instruction.dimensions) != [*range(len(cache_shape))]
        report.instructions += 1
        depth[instruction.id] = 1 + max((depth[i] for i in needed), default=0)
        writes[instruction.id] = update + max((writes[i] for i in needed), default=0)
        if opcode == "dot" and writes[instruction.id]:
            report.waiting_dots += 1
        if update:
            report.updates[opcode] += 1
        elif sizes[0] == cache_shape and moves:
            report.whole_cache[opcode] += 1
            report.whole_cache_bytes += prod(sizes[0]) * dtypes[0][1]
        if opcode in COLLECTIVES:
            for (name, size), shape in zip(dtypes, sizes, strict=True):
                if size and len(shape):
                    sent = report.collectives.setdefault(f"{opcode} {name}", [0, 0])
                    sent[0] += 1
                    sent[1] += prod(shape) * size
        if opcode == "sort":
            report.sorted = max(report.sorted, *sizes[0])
    for instruction in (i for computation in module.computations for i in computation.instructions):
        report.wide[instruction.opcode] += any(shape.element_type in WIDE for shape in _shapes(instruction))
    report.wide = +report.wide
    report.depth, report.writes_in_chain = max(depth.values()), max(writes.values())
    return report


def table(reports: dict[str, GraphReport]) -> Iterator[str]:
    """Lines in Markdown."""
    yield (
        "| graph | instructions | depth | writes | whole-cache operations | their bytes | collectives | products "
        "after a write | writes in a chain | longest sort | 64-bit |"
    )
    yield "|" + "---|" * 11
    for graph, r in reports.items():
        collectives = ", ".join(f"{count} {name} ({size} B)" for name, (count, size) in r.collectives.items())
        figures = [
            *(graph, r.instructions, r.depth, _counted(r.updates), _counted(r.whole_cache), r.whole_cache_bytes),
            *(collectives or "none", r.waiting_dots, r.writes_in_chain, r.sorted, _counted(r.wide)),
        ]
        yield "| " + " | ".join(map(str, figures)) + " |"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _opcode(instruction: Any, computations: dict[int, Any]) -> str:
    """The opcode, and for a call of a function that is one operator, that operator's."""
    if instruction.opcode == "call":
        called = computations[instruction.called_computation_ids[0]]
        return next(i.opcode for i in called.instructions if i.id == called.root_id)
    return instruction.opcode


def _shapes(instruction: Any) -> list[Any]:
    shape = instruction.shape
    return list(shape.tuple_shapes) or [shape]


def _in_order(computation: Any) -> Iterator[Any]:
    """Instructions after those that they need."""
    by_id, done = {i.id: i for i in computation.instructions}, set()
    for first in computation.instructions:
        stack = [first.id]
        while stack:
            wanted = [i for i in by_id[stack[-1]].operand_ids if i not in done]
            if wanted:
                stack += wanted
                continue
            current = stack.pop()
            if current not in done:
                done.add(current)
                yield by_id[current]
