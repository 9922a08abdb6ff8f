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


@pytest.mark.parametrize(("dtype", "count"), [("f16", 48), ("bf16", 48), ("int8", 96)])
def test_linear_cpu(dtype, count):
    options = ("--rows", "1", "50", "--shape", "2048", "1024", "--dtype", dtype, "--rounds", "1")
    ran = run(*options)
    assert ran.returncode == 0, ran.stderr
    first, *lines = ran.stdout.splitlines()
    assert first.startswith(f"{count} x (2048, 1024) {dtype}")
    names = [*variants(), "torch"]
    assert [line.split()[:3:2] for line in lines] == [[rows, f"{name}:"] for rows in ("1", "50") for name in names]
    number = r" +\d+ \( *\d+\.\d\)"
    for line in lines:
        ways = ["by output", "by unit", "90 % zero"]
        if "torch" in line:
            ways = ["f32", dtype][: 2 - (dtype == "int8")]
        elif line.split()[0] == "1" and dtype != "int8":
            ways.append("screened")
        assert re.search(f"rows, \\w+: +{' +'.join(way + number for way in ways)}$", line), line


def test_weights_of_some_size_and_one_variant():
    name = variants()[-1]
    ran = run("--rows", "1", "--shape", "256", "1024", "--rounds", "1", "--megabytes", "2", "--variants", name)
    first, *lines = ran.stdout.splitlines()
    assert first.startswith("4 x (256, 1024) f16") and [line.split()[2] for line in lines] == [f"{name}:", "torch:"]
