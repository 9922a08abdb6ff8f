"""The two small benchmarks of the kernels run, and print what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_linear_cpu(dtype):
    options = ("--rows", "1", "50", "--shape", "2048", "1024", "--dtype", dtype, "--rounds", "1")
    ran = run("linear_cpu.py", *options)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"48 x (2048, 1024) {dtype}")
    assert [line.split()[0] for line in lines[1:]] == ["1", "50"]
    assert all(re.search(rf"kernel +\d+ .*torch f32 +\d+ .*torch {dtype} +\d+", line) for line in lines[1:])


def test_profile_step(save_opt, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), batch_size=2, sequence_length=32)
    model.save_pretrained(tmp_path / "out")
    ran = run("profile_step.py", str(tmp_path / "out"), "--context", "20", "--steps", "3")
    assert ran.returncode == 0, ran.stderr
    shares = re.findall(r"^ *([a-z ]+) +(-?[\d.]+)%$", ran.stdout, flags=re.MULTILINE)
    assert [name.strip() for name, _ in shares] == ["matrix products", "attention", "layernorms", "everything else"]
    assert all(float(share) > 0 for _, share in shares)
    assert abs(sum(float(share) for _, share in shares) - 100) < 1
    refused = run("profile_step.py", str(tmp_path / "out"), "--context", "32")
    assert refused.returncode == 2 and "--context 32 is not below the export's 32 positions" in refused.stderr
