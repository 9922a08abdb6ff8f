"""`optimum-cli export neuron`, as installed: the register file is what optimum-cli finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimum.commands import optimum_cli
from requirements import needs_optimum_neuron
from safetensors import safe_open
from small_models import SHIPPED_MODEL, rounded, tiny_opt
from tqdm.std import tqdm
from transformers import AutoTokenizer, BertConfig

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.commands.common import AUTO_CAST_TYPE, CAST_TYPES
from optimum_opt_trn.commands.export import OWN_OPTIONS, SHARED_OPTIONS
from optimum_opt_trn.dtypes import normalize_dtype
from optimum_opt_trn.host_framework import INSTALLED


SUPPORT = Path(__file__).parents[1] / "support"
COMMAND = ["optimum-cli", "export", "neuron"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    tiny_opt().save_pretrained(directory)
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(directory)
    return directory


@pytest.fixture
def cli(monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *map(str, arguments)])
        optimum_cli.main()

    return run


def test_help_teaches():
    result = subprocess.run(
        [Path(sys.executable).with_name("optimum-cli"), "export", "neuron", "--help"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for words in ("examples:", "--kv_cache_dtype {fp16,bf16,fp32}", "checkpoint/", "compiled/", "(default: fp16)"):
        assert words in " ".join(result.stdout.split())
    assert "optimum_opt_trn" not in result.stderr


def test_one_progress_bar_at_a_time(cli, source, tmp_path, monkeypatch):
    shown, display = [], tqdm.display

    def record(bar, *arguments, **options):
        shown.append((bar.desc, bar.pos))
        return display(bar, *arguments, **options)

    monkeypatch.setattr(tqdm, "display", record)
    cli("-m", source, tmp_path / "out")
    assert "Splitting" in {name.strip(": ") for name, _ in shown}
    assert {position for _, position in shown} == {0}  # that of a bar within another is not


# The names that options of an export have in optimum-neuron's commands.
FLAGS = {"tp_degree": "--tensor_parallel_size", "amp": "--auto_cast_type"}


def test_every_option_of_an_export_has_a_flag_whose_help_names_its_default():
    flags, defaults = SHARED_OPTIONS | OWN_OPTIONS, OPTNeuronConfig()
    for name in OPTNeuronConfig.export_options():
        settings, default = flags[FLAGS.get(name, f"--{name}")], getattr(defaults, name)
        if type(default) is int and name != "sequence_length":  # which the model decides
            assert settings["type"] is int and f"(default: {default})" in settings["help"], name
    assert normalize_dtype(CAST_TYPES[0]) == defaults.amp and f"(default: {CAST_TYPES[0]})" in AUTO_CAST_TYPE["help"]


def test_export_as_told(cli, source, tmp_path, capsys):
    out = tmp_path / "out"
    cli(
        "-m", source, "--task", "text-generation", "--batch_size", 2, "--sequence_length", 96,
        "--tensor_parallel_size", 2, "--auto_cast_type", "bf16", "--kv_cache_dtype", "fp32", "--max_topk", 50,
        "--prompt_buckets", "32,96", "--cache_buckets", "48,96", "--instance_type", "cpu", "--eager", out,
    )  # fmt: skip
    assert OPTNeuronConfig.from_pretrained(out) == OPTNeuronConfig(
        batch_size=2, sequence_length=96, tp_degree=2, amp="bf16", kv_cache_dtype="f32", max_topk=50,
        prompt_buckets=(32, 96), cache_buckets=(48, 96),
    )  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "checkpoint", "compiled"} <= names
    assert str(out) in capsys.readouterr().out


def test_defaults(cli, source, tmp_path):
    cli("--model", source, "--eager", tmp_path / "out")
    made = OPTNeuronConfig.from_pretrained(tmp_path / "out")
    assert (made.target, made.tp_degree, made.batch_size, made.sequence_length, made.amp, made.kv_cache_dtype) == (
        "cpu", 1, 1, 224, "f16", "f16",
    )  # fmt: skip


@pytest.mark.parametrize(("given", "stored"), [("float16", torch.float16), ("float32", torch.float32)])
def test_torch_dtype_is_the_cast_type(cli, source, tmp_path, given, stored):
    cli("-m", source, "--torch_dtype", given, "--eager", tmp_path / "out")
    files = sorted((tmp_path / "out" / "checkpoint").glob("*.safetensors"))
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in tensors.items() if name.endswith("fc1.weight")} == {stored}
    assert {dtype for name, dtype in tensors.items() if "layer_norm" in name} == {torch.float32}


def test_compiled_export_generates_as_transformers(source, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model", source, "--sequence_length", "32", "--prompt_buckets", "32", "--cache_buckets", "32"]
    result = subprocess.run(
        [Path(sys.executable).with_name("optimum-cli"), *COMMAND[1:], *arguments, "--kv_cache_dtype", "fp32", out],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    prompt = torch.tensor([[2, 17, 90, 5, 33]])
    expected = rounded(tiny_opt()).generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    model = NeuronOPTForCausalLM.from_pretrained(out)
    assert model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist() == expected.tolist()


ERRORS = {
    "unknown option": (["--batchsize", "2"], "--batchsize", "did you mean --batch_size?"),
    "task": (["--task", "fill-mask"], "fill-mask", "text-generation"),
    "dtype": (["--auto_cast_type", "int8"], "int8", "bf16"),
    "two dtypes": (["--auto_cast_type", "bf16", "--torch_dtype", "float32"], "bf16", "float32", "give one"),
    "heads": (["--tensor_parallel_size", "3"], "tp_degree=3", "1, 2, 4"),
    "too long": (["--sequence_length", "300"], "300", "224"),
    "batch": (["--batch_size", "0"], "batch_size=0", "positive"),
    "not lengths": (["--prompt_buckets", "short,long"], "short,long", "comma-separated"),
    "instance": (["--instance_type", "trn1", "--tensor_parallel_size", "2"], "trn1", "instance_type='cpu'"),
}  # fmt: skip


def error_of(run, capsys, out: Path) -> str:
    """The only line on stderr that `run` ends with; checks that nothing was written."""
    before = sorted(out.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code not in (0, None)
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert sorted(out.rglob("*")) == before
    last = errors.splitlines()[-1]
    assert last.startswith("optimum-cli export neuron: error: ")
    return last


@pytest.mark.parametrize(("arguments", "words"), [(a, w) for a, *w in ERRORS.values()], ids=list(ERRORS))
def test_user_errors(cli, source, tmp_path, capsys, arguments, words):
    error = error_of(lambda: cli("-m", source, *arguments, "--eager", tmp_path / "out"), capsys, tmp_path)
    assert all(word in error for word in words), error


def test_what_cannot_fit_is_said_before_what_is_not_installed(cli, source, tmp_path, capsys):
    options = ["-m", source, "--instance_type", "trn1", "--tensor_parallel_size", "2", "--eager"]
    large = ["--batch_size", str(10**7)]
    error = error_of(lambda: cli(*options, *large, tmp_path / "out"), capsys, tmp_path)
    assert "batch_size=10000000" in error and "Choose batch_size=" in error and "--force" in error
    for others in (["--batch_size", "2"], [*large, "--force"]):
        error = error_of(lambda others=others: cli(*options, *others, tmp_path / "out"), capsys, tmp_path)
        assert ("the Neuron SDK" if INSTALLED else "Python 3.10 and 3.11") in error
        assert "instance_type='cpu'" in error


def test_another_model_type(cli, tmp_path, capsys):
    BertConfig().save_pretrained(tmp_path / "bert")
    error = error_of(lambda: cli("-m", tmp_path / "bert", tmp_path / "out"), capsys, tmp_path)
    assert "bert" in error and "opt" in error


def test_no_model(cli, tmp_path, capsys):
    error = error_of(lambda: cli("-m", tmp_path / "nothing-here", tmp_path / "out"), capsys, tmp_path)
    assert "nothing-here" in error


def test_output_that_is_something_else(cli, source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    error = error_of(lambda: cli("-m", source, tmp_path / "out"), capsys, tmp_path)
    assert "not an export" in error


def test_interrupted(cli, source, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_opt_trn.checkpoint.write.write_split", interrupt)
    monkeypatch.setattr("optimum_opt_trn.export.write_split", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli("-m", source, "--eager", tmp_path / "out")
    assert ended.value.code == 130
    assert "Interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# With the SDK, optimum-neuron has a command of that name, and it is the only one. These tests run in a process where a
# test double makes optimum-neuron find an SDK. Another one, for the `python3` that it starts, records its arguments.
WITH_SDK = """
import contextlib, fake_sdk, io, json, sys
from optimum.commands import optimum_cli
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["optimum-cli", "export", "neuron", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            optimum_cli.main()
        except SystemExit as ended:
            code = ended.code
    results.append({"out": out.getvalue(), "err": err.getvalue(), "code": code})
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def with_sdk(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdk")
    (directory / "bin").mkdir()
    python3 = directory / "bin" / "python3"
    python3.write_text(f'#!/bin/sh\necho "$@" >> {directory}/children\n')
    python3.chmod(0o755)
    BertConfig().save_pretrained(directory / "bert")
    out, bert = str(directory / "out"), str(directory / "bert")
    calls = {
        "help": ["--help"],
        "opt": ["-m", str(source), "--eager", "--kv_cache_dtype", "fp32", "--batch_size", "2", out],
        "opt, given": ["-m", str(source), "--eager", "--auto_cast_type=fp32", "--instance_type", "cpu", out + "2"],
        "opt, foreign": ["-m", str(source), "--num_beams", "4", "-O3", out + "3"],
        "opt, typo": ["-m", str(source), "--batchsize", "2", out + "3"],
        "bert": ["-m", bert, "--task", "fill-mask", "--instance_type", "inf2", "--auto_cast", "all", out + "4"],
        "bert, auto": ["-m", bert, "--instance_type", "trn1", out + "5"],
        "bert, ours": ["-m", bert, "--instance_type", "trn1", "--kv_cache_dtype", "fp32", out + "6"],
        "bert, cpu": ["-m", bert, "--instance_type", "cpu", out + "7"],
        "bert, nowhere": ["-m", bert, out + "8"],
    }
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "PATH": f"{python3.parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        [sys.executable, "-c", WITH_SDK, json.dumps(list(calls.values()))],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = dict(zip(calls, json.loads(result.stdout.splitlines()[-1]), strict=True))
    children = (directory / "children").read_text().splitlines()
    return results, calls, children, Path(out)


@needs_optimum_neuron
def test_with_the_sdk_there_is_one_command_for_both(with_sdk):
    results, _, _, _ = with_sdk
    assert results["help"]["code"] == 0
    for words in ("--lora_model_ids", "--kv_cache_dtype {fp16,bf16,fp32}", "{bf16,fp16,tf32,fp32}", "OPT models"):
        assert words in results["help"]["out"]


@needs_optimum_neuron
def test_with_the_sdk_only_what_was_given_counts_for_opt(with_sdk):
    results, _, _, out = with_sdk
    assert results["opt"]["code"] == 0, results["opt"]["err"]
    made = OPTNeuronConfig.from_pretrained(out)
    # The defaults of optimum-neuron are bf16 and float32.
    assert (made.amp, made.kv_cache_dtype, made.batch_size, made.target) == ("f16", "f32", 2, "cpu")
    assert OPTNeuronConfig.from_pretrained(f"{out}2").amp == "f32"


@needs_optimum_neuron
def test_with_the_sdk_what_opt_has_no_use_for_is_an_error(with_sdk):
    results, _, _, out = with_sdk
    (error,) = results["opt, foreign"]["err"].splitlines()
    assert results["opt, foreign"]["code"] == 1
    assert "--num_beams" in error and "-O3" in error
    (error,) = results["opt, typo"]["err"].splitlines()
    assert "did you mean --batch_size?" in error
    assert not Path(f"{out}3").exists()


@needs_optimum_neuron
def test_with_the_sdk_other_models_go_their_way(with_sdk):
    results, calls, children, _ = with_sdk
    assert results["bert"]["code"] == results["bert, auto"]["code"] == 0, results
    assert children == [
        f"-m optimum.exporters.neuron {' '.join(calls[name])}" for name in ("bert", "bert, auto")
    ]  # fmt: skip


@needs_optimum_neuron
@pytest.mark.parametrize(
    ("name", "word"),
    [("bert, ours", "--kv_cache_dtype"), ("bert, cpu", "'cpu'"), ("bert, nowhere", "--instance_type")],
)
def test_with_the_sdk_other_models_do_not_get_our_options(with_sdk, name, word):
    results, _, _, _ = with_sdk
    assert results[name]["code"] == 2
    assert word in results[name]["err"].splitlines()[-1]
