"""The benchmark of many requests, on a tiny model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from serving_cpu import parse  # noqa: E402
from traffic.mix import make_mix  # noqa: E402


def test_the_mix_is_log_uniform():
    mix = make_mix(4000, (8, 512), (8, 256), 1000)
    assert mix == make_mix(4000, (8, 512), (8, 256), 1000)
    lengths = [len(prompt) for prompt in mix.prompts]
    assert min(lengths) == 8 and max(lengths) == 512 and (min(mix.lengths), max(mix.lengths)) == (8, 256)
    # As many from 8 to 64 as from 64 to 512.
    assert abs(sum(length < 64 for length in lengths) / 4000 - 0.5) < 0.03
    assert abs(sum(map(math.log, mix.lengths)) / 4000 - (math.log(8) + math.log(257)) / 2) < 0.05
    assert mix.new_tokens == sum(mix.lengths)


def test_quick(tmp_path):
    shared = ["--quick", "--requests", "6", "--prompts", "2", "40", "--answers", "2", "12", "--eager"]
    command = [sys.executable, BENCHMARKS / "serving_cpu.py", *shared, "--figures", "requests", "--output", tmp_path]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (requests,) = json.loads((tmp_path / "serving_cpu.json").read_text())["results"]
    assert requests["peer"] == "ours-f16-static" and requests["slots_used"]["with_queue"] == 1
    assert requests["of_the_bound"]["reached"] > 0 and len(requests["rounds"]["ours"]) == 1
    assert "tiny, 4 slots, requests, ours-f16-static: tokens_per_second (ours " in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1"], "at least 2 requests at once"),
        (["--prompts", "9", "8"], "the shortest comes first"),
        (["--answers", "8", "2000"], "the models have 2048 positions"),
        (["--rounds", "0"], "--rounds 0: numbers must be 1 or more"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
