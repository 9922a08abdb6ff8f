"""The benchmark of products runs, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_opt_trn.targets.cpu.kernels import variants


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "linear_cpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_linear_cpu(dtype):
    options = ("--rows", "1", "50", "--shape", "2048", "1024", "--dtype", dtype, "--rounds", "1")
    ran = run(*options)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"48 x (2048, 1024) {dtype}")
    tables = [line.rstrip(":") for line in lines[1:] if not line.startswith(" ")]
    assert tables == list(variants())
    rows = [line for line in lines[1:] if line.startswith(" ")]
    assert [line.split()[0] for line in rows] == ["1", "50"] * len(tables)
    number = r"+\d+ .*"
    wanted = f"by output {number}by unit {number}90 % zero {number}torch f32 {number}torch {dtype} +\\d+"
    assert all(re.search(wanted, line) for line in rows)
