"""`optimum-cli neuron split` and `verify`, as installed, with optimum-neuron's commands and without them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optimum.commands import optimum_cli
from requirements import needs_optimum_neuron
from small_models import tiny_opt

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.checkpoint import verify_checkpoint
from optimum_opt_trn.checkpoint.manifest import MANIFEST_NAME, read_manifest
from optimum_opt_trn.export import export_opt


@pytest.fixture
def source(tmp_path) -> Path:
    tiny_opt().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def cli(monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "neuron", *map(str, arguments)])
        optimum_cli.main()

    return run


def installed(code: str) -> subprocess.CompletedProcess[str]:
    """Runs optimum-cli in a process where `code` ran before."""
    environment = {**os.environ, "COLUMNS": "120"}
    run = f"{code}\nfrom optimum.commands import optimum_cli\noptimum_cli.main()"
    return subprocess.run(
        [sys.executable, "-c", run, "neuron", "--help"], capture_output=True, text=True, timeout=300, env=environment
    )


@needs_optimum_neuron
def test_commands_are_added_to_those_of_optimum_neuron():
    result = installed("")
    assert result.returncode == 0, result.stderr
    for name in ("cache", "serve", "split", "verify"):
        assert result.stdout.count(f"\n    {name} ") == 1, result.stdout


def test_without_optimum_neurons_commands_there_is_a_parent_of_our_own():
    # A double of a release without them: neither its registration nor its module exists.
    result = installed("""
import sys, types
sys.modules["optimum.commands.neuron.base"] = None
sys.modules["optimum.commands.register.register_neuron"] = types.ModuleType("register_neuron")
""")
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("plan", "split", "verify")) and "serve" not in result.stdout


@pytest.mark.parametrize("name", ["split", "verify"])
def test_help_teaches(name, cli, capsys):
    with pytest.raises(SystemExit) as ended:
        cli(name, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"optimum-cli neuron {name} " in out and "examples:" in out


def test_split_then_verify(cli, source, tmp_path, capsys):
    cli("split", "-m", source, tmp_path / "out", "--auto_cast_type", "bf16")
    assert "3 files" in capsys.readouterr().out
    verify_checkpoint(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / MANIFEST_NAME)
    assert manifest is not None and manifest.amp == "bf16"
    cli("verify", tmp_path / "out")
    assert "out is complete" in capsys.readouterr().out
    for name in ("layer_000.safetensors", "layer_001.safetensors"):
        file = tmp_path / "out" / name
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit) as ended:
        cli("verify", tmp_path / "out")
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "cut off" in line]
    assert len(lines) == 2 and "layer_000" in lines[0] and "layer_001" in lines[1]


def test_verify_an_export(cli, source, tmp_path, capsys):
    export = export_opt(source, tmp_path / "out", OPTNeuronConfig(sequence_length=64))
    cli("verify", export)
    assert "every file is what was written" in capsys.readouterr().out
    (export / "notes.txt").write_text("mine")
    (export / "compiled" / "layer_001.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        cli("verify", export)
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if str(export) in line]
    assert len(lines) == 2 and "layer_001.safetensors is missing" in lines[0] and "notes.txt is no part" in lines[1]


def test_verify_says_what_an_earlier_version_did_not_record(cli, source, tmp_path, capsys):
    cli("split", "-m", source, tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: content[name] for name in ("format", "amp", "files")}))
    capsys.readouterr()
    cli("verify", tmp_path / "out")
    out = capsys.readouterr().out
    assert "no hash of config.json, generation_config.json, model.safetensors.index.json" in out
    assert "every file" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["split", "-m", "{source}"], ("OUTPUT",)),
        (["split", "-m", "{source}", "{out}", "--autocast_type", "fp16"], ("--autocast_type", "--auto_cast_type?")),
        (["split", "-m", "{source}", "{out}", "--auto_cast_type", "int8"], ("int8", "bf16")),
        (["split", "-m", "{source}/nowhere", "{out}"], ("nowhere",)),
        (["split", "-m", "{source}", "{source}"], ("is the source itself",)),
        (["split", "-m", "{source}", "{out}", "--delete_source_shards"], ("for ids on the hub",)),
    ],
)
def test_user_errors(arguments, words, cli, source, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli(*(argument.format(source=source, out=tmp_path / "out") for argument in arguments))
    assert ended.value.code not in (0, None)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("optimum-cli neuron split: error: ")
    assert all(word in error.splitlines()[-1] for word in words), error
    assert not (tmp_path / "out").exists()


def test_interrupted(cli, source, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_opt_trn.checkpoint.write.write_tensors", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli("split", "-m", source, tmp_path / "out")
    assert ended.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
