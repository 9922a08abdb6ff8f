"""`optimum-cli neuron plan`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import needs_optimum_neuron
from small_models import tiny_config
from transformers import OPTConfig

from optimum_opt_trn.commands import plan_chart
from optimum_opt_trn.commands.plan import main


@pytest.fixture
def opt_13b(tmp_path) -> str:
    config = OPTConfig(
        hidden_size=5120, word_embed_proj_dim=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the command in this process; returns what it printed."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        main()
        return capsys.readouterr().out

    return call


@needs_optimum_neuron
def test_optimum_cli_has_it_among_its_own_subcommands(opt_13b):
    code = (
        "import sys; from optimum.commands.neuron.base import NeuronCommand\n"
        "from optimum.commands.optimum_cli import main; main()\n"
        "print(*(info.name for info in NeuronCommand.SUBCOMMANDS), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "neuron", "plan", "-m", opt_13b, "--batch_size", "2", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    values = json.loads(ran.stdout)
    assert values["fits"] is True
    assert values["instance"] == "inf2.xlarge"
    assert {"cache", "consolidate", "serve", "plan"} <= set(ran.stderr.splitlines()[-1].split())


def test_as_a_module_it_imports_neither_torch_nor_transformers(opt_13b):
    code = (
        "import sys; from optimum_opt_trn.commands.plan import main; sys.argv[0] = 'plan'; main()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, "-m", opt_13b], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "12.9 billion parameters" in ran.stdout


def test_the_table_says_what_goes_where_in_100_columns(opt_13b, plan):
    shown = ("weights: attention", "keys and values", "workspace", "reserve", "largest batch size", "roofline")
    for batch, verdict in (("2", "fits"), ("3", "DOES NOT FIT")):
        text = plan("-m", opt_13b, "--instance", "trn1.2xlarge", "--batch_size", batch)
        lines = text.splitlines()[1:]  # the first is the model's name
        assert max(map(len, lines)) <= 100
        assert next(line for line in lines if line.strip().startswith("free ")).endswith(verdict)
        assert all(part in text for part in (*shown, "inf2.48xlarge", "trn2.48xlarge"))
    assert "longest sequence that fits     1963 positions at batch size 3" in text
    assert "host memory                    512.00 MiB to split, 600.17 MiB to load, of 32.00 GiB" in text
    assert "                               14.35 GiB to trace an export, and what the compiler takes" in text
    assert "to trace" not in plan("-m", opt_13b, "--instance", "cpu")


@pytest.mark.parametrize("instance", ["cpu", "trn1.2xlarge"])
def test_a_small_model_is_told_in_units_that_suit_it(instance, tmp_path, plan):
    tiny_config().save_pretrained(tmp_path)
    text = plan("-m", str(tmp_path), "--instance", instance)
    assert " 0.00 " not in text and "KiB" in text and "0.0815 million parameters" in text


def test_the_dtypes_change_the_bytes(opt_13b, plan):
    options = ("-m", opt_13b, "--instance", "inf2.48xlarge", "--tensor_parallel_size", "8", "--json")
    plans = {name: json.loads(plan(*options, "--auto_cast_type", name)) for name in ("fp16", "bf16", "fp32")}
    plans["int8"] = json.loads(plan(*options, "--weight_dtype", "int8"))
    size = {name: values["weights_bytes_per_core"] for name, values in plans.items()}
    assert size["fp16"] == size["bf16"]
    assert 1.95 < size["fp32"] / size["fp16"] < 2
    assert 1.85 < size["fp16"] / size["int8"] < 1.95  # the embedding stays in fp16, and the head has a byte more
    assert (plans["int8"]["weight_dtype"], plans["int8"]["cache_dtype"]) == ("int8", "f16")


def test_this_host_is_an_instance_too(tmp_path, plan):
    tiny_config().save_pretrained(tmp_path)
    values = json.loads(plan("-m", str(tmp_path), "--instance", "cpu", "--json"))
    assert values["fits"] is True
    assert 0 < values["reserve_bytes_per_core"] < values["free_bytes_per_core"]
    assert values["decode_tokens_per_second"] is None
    assert "in the process" in plan("-m", str(tmp_path), "--instance", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--instance", "trn9"), "trn9"),
        (("--instance", "trn1.2xlarge", "--tensor_parallel_size", "4"), "at 1, 2"),
        (("--sequence_length", "5000"), "2048 positions"),
        (("--plot", "chart.pdf"), ".png or .svg"),
    ],
)
def test_an_error_is_one_line_and_status_1(opt_13b, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["plan", "-m", opt_13b, *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert error.count("\n") == 1
    assert message in error


def test_a_chart_without_matplotlib_names_the_way_to_it(opt_13b, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["plan", "-m", opt_13b, "--plot", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'optimum-opt-trn[plot]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("instance", ["trn1.2xlarge", "cpu"])
def test_a_chart(opt_13b, plan, tmp_path, suffix, start, instance):
    file = tmp_path / f"chart{suffix}"
    plan("-m", opt_13b, "--instance", instance, "--plot", str(file))
    assert file.read_bytes().startswith(start)
    if suffix == ".svg":  # whose comments are the texts that are drawn
        assert f"<!-- {Path(opt_13b).parent.name}" in file.read_text()


def test_the_chart_shows_few_batch_sizes_up_to_the_largest():
    for largest in (1, 7, 20, 21, 1000):
        sizes = plan_chart._sizes(largest)
        assert (sizes[0], sizes[-1]) == (1, largest)
        assert len(sizes) <= 21
