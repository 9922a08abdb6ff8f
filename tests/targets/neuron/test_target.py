"""The Neuron target on the double of the SDK, in a process of its own: the others have to be without an SDK."""

import subprocess
import sys
from pathlib import Path

from requirements import needs_optimum_neuron


CASES = Path(__file__).parent / "double_cases.py"


@needs_optimum_neuron
def test_on_the_double():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", CASES],
        capture_output=True, text=True, timeout=900, cwd=CASES.parents[3],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
