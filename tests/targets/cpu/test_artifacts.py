"""Artifacts on disk: the manifest decides whether they may be used, and nothing broken is."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED_MODEL, tiny_config, tiny_opt
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets.cpu.artifacts import _graph_key, load_stages
from optimum_opt_trn.targets.cpu.compiler import has_compiler
from optimum_opt_trn.targets.cpu.stages import Stages


PROMPTS = torch.tensor([[2, 17, 99, 4, 56], [2, 5, 6, 7, 8]])
STAGES = [field.name for field in dataclasses.fields(Stages)]


@pytest.fixture
def source(save_opt) -> Path:
    directory = save_opt(tiny_opt())
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(directory)  # else the export warns of its lack
    return directory


@pytest.fixture
def exported(source, tmp_path) -> Path:
    """An export whose manifest lists artifacts, all as they should be but for their content.

    What is tested here is decided before a compiled stage is opened; opening and running them is test_stages.py's.
    """
    config = OPTNeuronConfig(batch_size=2, sequence_length=64)
    output = export_opt(source, tmp_path / "out", config, eager=True)
    artifacts = {}
    for name in STAGES:
        content = name.encode() * 100
        (output / "compiled" / f"{name}.pt2").write_bytes(content)
        artifacts[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(output, artifacts=artifacts)
    return output


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
    assert len(manifest["graph"]) == 64


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
def test_another_host(key, value, exported, caplog):
    here = manifest_of(exported)["host"]
    host = {**here, key: value}
    if value is None:
        del host[key]
    change_manifest(exported, host=host)
    assert_runs_eagerly(exported, caplog, f"it was compiled for {key} {value} (here {here[key]})")


def test_other_graphs(exported, caplog):
    change_manifest(exported, graph="0" * 64)
    assert_runs_eagerly(exported, caplog, "compiled for other shapes, or by another version of optimum_opt_trn")


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "changed"])
def test_damaged_artifact(damage, name, exported):
    file = exported / "compiled" / f"{name}.pt2"
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
    with pytest.raises(CheckpointError, match=rf"{name}\.pt2 is missing or not what the manifest says.*eager=True"):
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
        lambda m: m.pop("graph"),
        lambda m: m.pop("artifacts"),
        lambda m: m.update(host="x86"),
        lambda m: m.update(artifacts=["head"]),
        lambda m: m["artifacts"].pop("head"),
        lambda m: m["artifacts"].update(more=m["artifacts"]["head"]),
        lambda m: m["artifacts"].update({"../head": m["artifacts"].pop("head")}),
        lambda m: m["artifacts"]["context_layer"].pop("sha256"),
        lambda m: m["artifacts"].update(context_layer=None),
    ],
)
def test_manifest_of_another_form(change, exported):
    manifest = manifest_of(exported)
    change(manifest)
    (exported / "compiled" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken"):
        load_stages(tiny_config(), OPTNeuronConfig(batch_size=2, sequence_length=64), exported / "compiled")


def test_graph_key_tells_what_graphs_depend_on():
    config, options = tiny_config(), {"batch_size": 2, "sequence_length": 64}
    keys = {
        "same": _graph_key(tiny_config(), OPTNeuronConfig(**options)),
        # These change no graph: one compiled layer serves any depth, and a checkpoint's name is only a name.
        "depth": _graph_key(tiny_config(num_hidden_layers=9), OPTNeuronConfig(**options)),
        "name": _graph_key(config, OPTNeuronConfig(**options, checkpoint_id="a/b", checkpoint_revision="0")),
    }
    assert set(keys.values()) == {_graph_key(config, OPTNeuronConfig(**options))}
    others = [
        *(_graph_key(config, OPTNeuronConfig(**{**options, **change})) for change in (
            {"batch_size": 3}, {"sequence_length": 65}, {"tp_degree": 2}, {"amp": "bf16"}, {"kv_cache_dtype": "f32"},
            {"max_topk": 5},
        )),
        *(_graph_key(tiny_config(**change), OPTNeuronConfig(**options)) for change in (
            {"vocab_size": 127}, {"ffn_dim": 92}, {"num_attention_heads": 2}, {"word_embed_proj_dim": 32},
            {"hidden_size": 128, "num_attention_heads": 8}, {"do_layer_norm_before": False}, {"enable_bias": False},
            {"layer_norm_elementwise_affine": False}, {"activation_function": "gelu"}, {"tie_word_embeddings": False},
            {"_remove_final_layer_norm": True},
        )),
    ]  # fmt: skip
    assert len({*keys.values(), *others}) == 1 + len(others)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A PATH without any program on it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor_config.patch({"cpp.cxx": (None, "g++")}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


def test_export_without_a_compiler(source, tmp_path, caplog, no_compiler):
    assert not has_compiler()
    output = export_opt(source, tmp_path / "out", OPTNeuronConfig(batch_size=2, sequence_length=64))
    messages = warnings_in(caplog)
    assert len(messages) == 1
    assert messages[0].startswith("No C++ compiler was found") and "export again" in messages[0]
    assert manifest_of(output)["artifacts"] == {}
    assert_runs_eagerly(output, caplog, "it was exported without compilation")
