"""What a run writes: JSON with every time, tables in Markdown, a plot. Each file is written beside and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .claims import check
from .plot import draw
from .records import Record, Records


NAME = "decode_cpu"


def write_report(output: Path, about: dict[str, Any], records: Records, failures: list[dict[str, str]]) -> None:
    """Writes `decode_cpu.json`, `.md` and, with matplotlib, `.png` to `output`.

    Args:
        output: a folder, made if need be.
        about: of the machine, the versions and the options; `busy` and `zeros` as in `claims.check`.
        records: all that was measured.
        failures: what went wrong, with `shape`, `group` and `error`.
    """
    output.mkdir(parents=True, exist_ok=True)
    claims = [vars(claim) for claim in check(records, about["busy"], about["zeros"])]
    content = {**about, "claims": claims, "failures": failures, "records": records.as_json()}
    _replace(output / f"{NAME}.json", lambda file: file.write_text(as_lines(content)))
    text = markdown(about, records, failures)
    _replace(output / f"{NAME}.md", lambda file: file.write_text(text))
    _replace(output / f"{NAME}.png", lambda file: draw(records, file))


def as_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, and one for each element of the lists among them, such as a record."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(element)}" for element in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    partial = file.with_name(f".partial-{file.name}")
    write(partial)
    if partial.exists():  # a plot is not there without matplotlib
        os.replace(partial, file)


def markdown(about: dict[str, Any], records: Records, failures: list[dict[str, str]]) -> str:
    """The tables, for each shape those that have rows."""
    lines = ["# Decoding on the CPU, beside others", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if isinstance(value, (str, int, float))]
    lines += ["", "Times are medians with quartiles in brackets. In a row, both were measured in turns.", ""]
    for shape in dict.fromkeys(record.shape for record in records.all):
        mine = Records(records.select(shape=shape))
        lines += [f"## OPT {shape}", ""]
        lines += _compared(mine, "decode", "ms a step", "context")
        lines += _compared(mine, "prefill", "ms to first token", "prompt")
        lines += _loads(mine) + _conversions(mine) + _memory(mine)
        agreement = about.get("agreement", {}).get(shape, {})
        if agreement:
            shown = "; ".join(f"{name} {same} of {total}" for name, (same, total) in agreement.items())
            lines += [f"First greedy tokens that agree with those of ours beside it: {shown}.", ""]
    if failures:
        lines += ["## Did not run", ""]
        lines += [f"- {f['shape']}, {f['group']}: {f['error']}" for f in failures]
        lines += [""]
    lines += ["## Claims", ""]
    lines += [f"- {claim}" for claim in check(records, about["busy"], about["zeros"])]
    return "\n".join(lines) + "\n"


def _table(*rows: list[str]) -> list[str]:
    """Of cells; the first row is the head. Nothing without a second."""
    if len(rows) < 2:
        return []
    shown = [f"| {' | '.join(row)} |" for row in rows]
    return [shown[0], "|" + "---|" * len(rows[0]), *shown[1:], ""]


def _spread(record: Record, scale: float = 1.0, digits: int = 1) -> str:
    low, high = record.quartiles
    return f"{record.median * scale:.{digits}f} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def _share(record: Record) -> str:
    shares = sorted(record.shares)
    return f"{shares[len(shares) // 2]:.0%}" if shares else ""


def _compared(records: Records, figure: str, unit: str, length: str) -> list[str]:
    """Rows of every contender beside the first one of its group."""
    head = ["measured", "batch", length, unit, "beside it", unit, "times", "runs each"]
    rows = [[*head, "share of roofline", "beside it"] if figure == "decode" else head]
    for record in records.select(figure=figure):
        where = {"group": record.group, "figure": figure, "batch": record.batch, "length": record.length}
        base = records.select(**where)[0]
        if record is base:
            continue
        row = [record.contender, str(record.batch), str(record.length), _spread(record, 1e3), base.contender]
        row += [_spread(base, 1e3), f"{record.median / base.median:.2f}", str(len(record.runs))]
        rows.append([*row, _share(record), _share(base)] if figure == "decode" else row)
    return _table(*rows) + _slowdowns(records, figure, unit, length)


def _slowdowns(records: Records, figure: str, unit: str, length: str) -> list[str]:
    """What the neighbours cost each contender."""
    rows = [["beside neighbours", "measured with", "batch", length, f"{unit}, quiet", unit, "times"]]
    for record in records.select(figure=figure):
        if (slowdown := record.slowdown) is not None:
            quiet = f"{record.median / slowdown * 1e3:.1f}"
            where = [record.contender, record.group, str(record.batch), str(record.length)]
            rows.append([*where, quiet, _spread(record, 1e3), f"{slowdown:.2f}"])
    return _table(*rows)


def _loads(records: Records) -> list[str]:
    rows = [["started and loaded, s", "beside", "start, imports", "load", "first token of 32, cold", "runs"]]
    for load in records.select(figure="load", batch=1):
        parts = [
            records.one(figure=figure, batch=1, group=load.group, contender=load.contender)
            for figure in ("start", "load", "first")
        ]
        cells = [_spread(part, 1, 2) if part else "" for part in parts]
        rows.append([load.contender, load.group, *cells, str(len(load.runs))])
    return _table(*rows)


def _conversions(records: Records) -> list[str]:
    rows = [["exported or converted", "layers", "s", "runs"]]
    for record in records.all:
        if record.figure in ("convert", "compile"):
            name = record.contender + (", compilation alone" if record.figure == "compile" else "")
            layers = str(record.length) if record.length else "all"
            rows.append([name, layers, _spread(record), str(len(record.runs))])
    return _table(*rows)


def _memory(records: Records) -> list[str]:
    rows = [["peak memory, MB", "beside", "batch", "resident", "of no file (anonymous)"]]
    for record in records.select(figure="resident"):
        where = {"group": record.group, "batch": record.batch, "contender": record.contender}
        anonymous = records.one(figure="anonymous", **where)
        cells = [f"{part.median / 1e6:.0f}" if part else "" for part in (record, anonymous)]
        rows.append([record.contender, record.group, str(record.batch), *cells])
    return _table(*rows)
