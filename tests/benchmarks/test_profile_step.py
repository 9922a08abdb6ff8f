"""Where a step's time goes, of a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

from small_models import tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "profile_step.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_profile_step(save_opt, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), batch_size=2, sequence_length=32)
    model.save_pretrained(tmp_path / "out")
    ran = run(str(tmp_path / "out"), "--context", "20", "--steps", "3")
    assert ran.returncode == 0, ran.stderr
    shares = re.findall(r"^ *([a-z ]+) +(-?[\d.]+)%$", ran.stdout, flags=re.MULTILINE)
    assert [name.strip() for name, _ in shares] == [
        "matrix products",
        "attention",
        "token sampling",
        "everything else",
    ]
    assert all(float(share) > 0 for _, share in shares)
    assert abs(sum(float(share) for _, share in shares) - 100) < 1
    refused = run(str(tmp_path / "out"), "--context", "32")
    assert refused.returncode == 2 and "--context 32 is not below the export's 32 positions" in refused.stderr
