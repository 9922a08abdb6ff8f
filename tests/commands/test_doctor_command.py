"""`optimum-cli neuron doctor`: what it says of this host is so, and its exit status is that of `cpu`."""

from __future__ import annotations

import json
import platform
import sys

import pytest
import torch
import transformers
from optimum.commands import optimum_cli

from optimum_opt_trn.commands import doctor
from optimum_opt_trn.version import __version__


@pytest.fixture
def cli(monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "neuron", "doctor", *arguments])
        optimum_cli.main()

    return run


def test_help_teaches(cli, capsys):
    with pytest.raises(SystemExit) as ended:
        cli("--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in out and "exit status" in out


def test_what_it_says_is_so(cli, capsys):
    cli("--json")
    report = json.loads(capsys.readouterr().out)
    assert report["cpu_works"] and report["runs_here"]["cpu"].startswith("yes")
    # Some builds name themselves in one of the two.
    assert report["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["packages"]["transformers"] == transformers.__version__
    assert report["packages"]["optimum-opt-trn"] == __version__
    assert platform.python_version() in report["host"]["python"]
    assert report["neuron"]["torch-neuronx"] == "not installed" and report["neuron"]["devices"] == "none"
    assert report["runs_here"]["trn1, inf2, trn2"].startswith("no: torch-neuronx")
    assert any("optimum-opt-trn[neuronx]" in line for line in report["missing"])


def test_a_host_on_which_nothing_runs(cli, capsys, monkeypatch):
    def broken() -> None:
        raise OSError("no space left")

    monkeypatch.setattr(doctor, "_try_small_model", broken)
    with pytest.raises(SystemExit) as ended:
        cli()
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "no: OSError: no space left" in out and "Traceback" not in out


def test_the_kernels_are_those_that_models_run_with(cli, capsys):
    from optimum_opt_trn.targets.cpu.kernels import chosen_variant

    variant = chosen_variant()
    cli("--json")
    assert json.loads(capsys.readouterr().out)["runs_here"]["cpu"] == f"yes, with kernels: {variant}"


def test_a_host_without_kernels(cli, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_kernels", lambda: (None, "need AVX2"))
    cli()
    out = capsys.readouterr().out
    assert "without kernels" in out and "Kernels for cpu, which need AVX2." in out


def test_the_sdk_and_a_device(cli, capsys, monkeypatch):
    found = dict.fromkeys((*doctor.SDK_PACKAGES, *doctor.PACKAGES), "1.0")
    monkeypatch.setattr(doctor, "_version", found.get)
    monkeypatch.setattr(doctor, "_devices", lambda: ["neuron0", "neuron1"])
    monkeypatch.setattr(doctor, "_try_small_model", lambda: None)
    monkeypatch.setattr(doctor, "find_kernels", lambda: ("avx2", ""))
    cli()
    out = capsys.readouterr().out
    assert "yes, on 2 devices" in out and "nothing is missing" in out
    monkeypatch.setattr(doctor, "_devices", list)
    cli()
    assert "exports only: this host has no Neuron device" in capsys.readouterr().out


def test_processors_as_linux_tells_them(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fma avx2\n\nprocessor\t: 1\nflags\t: none\n")
    assert doctor._cpu_facts(file) == {"processor": "0", "model name": "Some CPU", "flags": "fma avx2"}
    assert doctor._cpu_facts(tmp_path / "nothing") == {}
