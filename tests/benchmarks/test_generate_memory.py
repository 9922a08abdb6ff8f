"""The benchmark of the memory of exporting, loading and generating, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate_memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_each_step_is_watched(tmp_path):
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--new_tokens", "2", "--directory", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [line.strip("| ").split(" | ") for line in ran.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["export", "load, generate 2 tokens"]
    for _, _, anonymous, files, resident in rows:  # torch is loaded in each
        assert float(anonymous) > 0.1 and float(files) > 0.05
        assert float(resident) <= float(anonymous) + float(files) + 0.02
    assert not any(tmp_path.iterdir())
