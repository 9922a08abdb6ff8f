"""The benchmark that compares planned with resident memory, on a small grid."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_cpu.py"


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's /proc")
def test_resident_memory_is_what_the_plan_says():
    ran = subprocess.run([sys.executable, str(SCRIPT), "--small"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("| 512 |") == 2
