"""The Neuron target on the double of the SDK, in a process of its own: the others have to be without an SDK."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import needs_optimum_neuron


HERE = Path(__file__).parent


@needs_optimum_neuron
@pytest.mark.parametrize("cases", ["double_cases.py", "graph_version_cases.py", "int8_cases.py", "trust_cases.py"])
def test_on_the_double(cases, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / cases],
        capture_output=True, text=True, timeout=900, cwd=HERE.parents[2],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
