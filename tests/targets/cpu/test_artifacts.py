"""Artifacts on disk: the manifest decides whether they may be used, and nothing broken is."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from small_models import SHIPPED_MODEL, tiny_opt
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets.cpu.artifacts import find_kernels
from optimum_opt_trn.targets.cpu.kernels import SOURCE, KernelArithmetic


PROMPTS = torch.tensor([[2, 17, 99, 4, 56], [2, 5, 6, 7, 8]])


@pytest.fixture
def source(save_opt) -> Path:
    directory = save_opt(tiny_opt())
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(directory)  # else the export warns of its lack
    return directory


@pytest.fixture
def exported(source, tmp_path) -> Path:
    return export_opt(source, tmp_path / "out", OPTNeuronConfig(batch_size=2, sequence_length=64))


def manifest_of(output: Path) -> dict:
    return json.loads((output / "compiled" / "manifest.json").read_text())


def change_manifest(output: Path, **changes) -> None:
    (output / "compiled" / "manifest.json").write_text(json.dumps({**manifest_of(output), **changes}))


def generate(model: NeuronOPTForCausalLM) -> torch.Tensor:
    return model.generate(PROMPTS, do_sample=False, max_new_tokens=8, min_new_tokens=8)


def warnings_in(caplog) -> list[str]:
    """What was warned of; other libraries may inform about more."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_runs_eagerly(output: Path, caplog, reason: str) -> None:
    caplog.clear()
    model = NeuronOPTForCausalLM.from_pretrained(output)
    messages = warnings_in(caplog)
    assert len(messages) == 1, messages
    assert "runs eagerly, correct and slower" in messages[0]
    assert reason in messages[0] and str(output) in messages[0]
    caplog.clear()
    eager = NeuronOPTForCausalLM.from_pretrained(output, eager=True)
    assert not warnings_in(caplog)  # who asks for it needs no warning
    assert torch.equal(generate(model), generate(eager))
    torch.testing.assert_close(model(PROMPTS).logits, eager(PROMPTS).logits, rtol=0, atol=0)


def test_eager_export(source, tmp_path, caplog):
    output = export_opt(source, tmp_path / "out", OPTNeuronConfig(batch_size=2, sequence_length=64), eager=True)
    assert not warnings_in(caplog)
    assert manifest_of(output)["artifacts"] == {}
    assert_runs_eagerly(output, caplog, "it was exported without compilation")


def test_manifest(exported):
    manifest = manifest_of(exported)
    assert manifest["host"]["torch"] == torch.__version__
    assert manifest["host"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert manifest["source"] == hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    library = (exported / "compiled" / "kernels.so").read_bytes()
    entry = {"bytes": len(library), "sha256": hashlib.sha256(library).hexdigest()}
    assert manifest["artifacts"] == {"kernels.so": entry}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch", "2.1.0"),
        ("machine", "riscv64"),
        ("cpu_capability", "NEON"),
        ("cpu_capability", None),
        ("cpu_flags", "0" * 16),
    ],
)
def test_another_host(key, value, exported, caplog, monkeypatch):
    here = manifest_of(exported)["host"]
    host = {**here, key: value}
    if value is None:
        del host[key]
    change_manifest(exported, host=host)
    assert_compiled_again_or_eager(exported, caplog, monkeypatch, f"for {key} {value} (here {here[key]})")


def test_other_kernels(exported, caplog, monkeypatch):
    change_manifest(exported, source="0" * 64)
    assert_compiled_again_or_eager(exported, caplog, monkeypatch, "by another version of optimum_opt_trn")


def assert_compiled_again_or_eager(output: Path, caplog, monkeypatch, reason: str) -> None:
    (output / "compiled" / "kernels.so").write_bytes(b"for another host")
    caplog.clear()
    model = NeuronOPTForCausalLM.from_pretrained(output)
    assert isinstance(model.runtime.program.arithmetic, KernelArithmetic) and not warnings_in(caplog)
    generate(model)
    # Where it cannot be compiled.
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels.cached_assets_path", lambda *_: output)
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels._compiler", lambda: "false")
    assert_runs_eagerly(output, caplog, f"its kernels were compiled {reason}, and could not be compiled again (false")


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "changed"])
def test_damaged_kernels(damage, exported):
    file = exported / "compiled" / "kernels.so"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"0")
    else:
        content[50] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"kernels\.so is missing or not what the manifest says.*eager=True"):
        NeuronOPTForCausalLM.from_pretrained(exported)
    generate(NeuronOPTForCausalLM.from_pretrained(exported, eager=True))  # the way out


def test_missing_manifest(exported):
    (exported / "compiled" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken.*export the model again"):
        NeuronOPTForCausalLM.from_pretrained(exported)
    generate(NeuronOPTForCausalLM.from_pretrained(exported, eager=True))


@pytest.mark.parametrize("length", [0, 1, 20, -3])
def test_truncated_manifest(length, exported):
    file = exported / "compiled" / "manifest.json"
    file.write_text(file.read_text()[:length])
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken"):
        NeuronOPTForCausalLM.from_pretrained(exported)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("host"),
        lambda m: m.pop("source"),
        lambda m: m.pop("artifacts"),
        lambda m: m.update(host="x86"),
        lambda m: m.update(artifacts=["kernels.so"]),
        lambda m: m["artifacts"].update(more=m["artifacts"]["kernels.so"]),
        lambda m: m["artifacts"].update({"../kernels.so": m["artifacts"].pop("kernels.so")}),
    ],
)
def test_manifest_of_another_form(change, exported):
    manifest = manifest_of(exported)
    change(manifest)
    (exported / "compiled" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken"):
        find_kernels(exported / "compiled")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A PATH without any program on it, and nothing that was compiled before."""
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.kernels.cached_assets_path", lambda *_: tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor_config.patch({"cpp.cxx": (None, "g++")}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


def test_export_without_a_compiler(source, tmp_path, caplog, no_compiler):
    output = export_opt(source, tmp_path / "out", OPTNeuronConfig(batch_size=2, sequence_length=64))
    messages = warnings_in(caplog)
    assert len(messages) == 1
    assert "no C++ compiler was found" in messages[0] and "export again" in messages[0]
    assert manifest_of(output)["artifacts"] == {}
    assert_runs_eagerly(output, caplog, "it was exported without compilation")
