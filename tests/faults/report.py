"""Sections of docs/reliability.md, each written by the run that it reports on."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch
import transformers


PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replaces what is between the marks of a section of the page."""
    begin, end = f"<!-- {name}: written by a run -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} has no section {name!r}")
    page.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")


def where() -> str:
    """The day and the host of a run."""
    facts = Path("/proc/cpuinfo")
    model = "an unknown processor"
    if facts.is_file():
        lines = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line]
        model = f"{lines[0]}, {len(lines)} cores" if lines else model
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return f"{date.today().isoformat()}, {model}; {versions}"
