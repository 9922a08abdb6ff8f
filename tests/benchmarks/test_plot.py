"""The pictures of the benchmark fit a page, and say what their axes are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.speed.plot import draw
from benchmarks.speed.records import Record, Records


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_a_picture_fits_a_page_and_names_its_axes(batches: int, tmp_path: Path) -> None:
    made = []
    for batch in range(1, batches + 1):
        for peer in ("openvino", "transformers", "onnxruntime"):
            for contender in ("ours-f16", peer):
                numbers = {"runs": [0.1, 0.2], "bandwidths": [1e9, 1e9], "bytes": [1e8, 1e8]}
                made.append(Record("125m", peer, contender, "decode", batch, 64, **numbers))
    draw(Records(made), tmp_path / "plot.png")
    header = (tmp_path / "plot.png").read_bytes()[16:20]  # the width, after signature, length and type of IHDR
    assert int.from_bytes(header, "big") <= 1200
    draw(Records(made), tmp_path / "plot.svg")
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "plot.svg").read_text())  # matplotlib's comments
    assert texts.count("ms a step") == batches
    assert [text for text in texts if "ours" in text] == ["ours-f16, in turns with the peer below it"]
    assert texts.count("openvino") == batches
