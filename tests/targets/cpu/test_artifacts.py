"""What an export for `cpu` has in compiled/: fc2 by unit, copies of fc1 and the head, checked at load, and no code."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import SHIPPED_MODEL, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets.cpu.artifacts import TENSOR_NAME
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic


HEAD = "embeddings_and_head.safetensors"
PROMPTS = torch.tensor([[2, 17, 99, 4, 56], [2, 5, 6, 7, 8]])


@pytest.fixture
def source(save_opt) -> Path:
    directory = save_opt(tiny_opt())
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(directory)  # without it the export warns
    return directory


@pytest.fixture
def exported(source, tmp_path) -> Path:
    return export(source, tmp_path)


def export(source: Path, tmp_path: Path, eager: bool = False, **options) -> Path:
    neuron_config = OPTNeuronConfig(**{"batch_size": 2, "sequence_length": 64, **options})
    return export_opt(source, tmp_path / "out", neuron_config, eager=eager)


def manifest_of(output: Path) -> dict:
    return json.loads((output / "compiled" / "manifest.json").read_text())


def change_manifest(output: Path, manifest: dict) -> None:
    (output / "compiled" / "manifest.json").write_text(json.dumps(manifest))


def generate(model: NeuronOPTForCausalLM) -> torch.Tensor:
    return model.generate(PROMPTS, do_sample=False, max_new_tokens=8, min_new_tokens=8)


def assert_sound(output: Path, by_unit: bool) -> None:
    """It runs on the kernels, with fc2 by unit or not, and as it does eagerly."""
    model, eager = (NeuronOPTForCausalLM.from_pretrained(output, eager=eager) for eager in (False, True))
    assert isinstance(model.runtime.program.arithmetic, KernelArithmetic)
    for layer, plain in zip(model.runtime.weights.layers, eager.runtime.weights.layers, strict=True):
        for shard, other in zip(layer["fc2.weight"], plain["fc2.weight"], strict=True):
            assert torch.equal(shard, other) and (shard.stride(0) == 1) == by_unit and other.stride(1) == 1
    assert torch.equal(generate(model), generate(eager))


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("amp", ["f16", "bf16", "f32"])
def test_fc2_is_stored_by_unit(source, tmp_path, amp, tp_degree):
    output = export(source, tmp_path, amp=amp, tp_degree=tp_degree)
    names = sorted(file.name for file in (output / "compiled").iterdir())
    assert names == [HEAD, "layer_000.safetensors", "layer_001.safetensors", "manifest.json"]
    for index, name in enumerate(names[1:3]):
        with safe_open(output / "compiled" / name, "pt") as file:
            stored = file.get_tensor(TENSOR_NAME)
        weight = load_file(output / "checkpoint" / name)[f"model.decoder.layers.{index}.fc2.weight"]
        assert torch.equal(stored, weight.T)
    assert_sound(output, by_unit=True)


def test_skipping_changes_no_bit(source, tmp_path, exported):
    model = NeuronOPTForCausalLM.from_pretrained(exported)
    logits = model(PROMPTS).logits
    object.__setattr__(model.runtime.program.arithmetic, "skip_zeros", False)
    assert torch.equal(model(PROMPTS).logits, logits)


@pytest.mark.parametrize(("change", "stored"), [("eager", []), ("gelu", [HEAD])])
def test_nothing_is_stored_where_nothing_could_be_skipped(change, stored, save_opt, tmp_path):
    source = save_opt(tiny_opt(activation_function="gelu") if change == "gelu" else tiny_opt())
    output = export(source, tmp_path, eager=change == "eager")
    assert sorted(file.name for file in (output / "compiled").iterdir()) == [*stored, "manifest.json"]
    assert_sound(output, by_unit=False)


def test_an_export_without_a_copy_of_the_head(exported):
    """As those of earlier versions."""
    manifest = manifest_of(exported)
    del manifest["artifacts"][HEAD]
    change_manifest(exported, manifest)
    (exported / "compiled" / HEAD).unlink()
    assert NeuronOPTForCausalLM.from_pretrained(exported).runtime.screened_head is None
    assert_sound(exported, by_unit=True)


def test_an_export_without_copies_of_fc1(exported):
    """As those of earlier versions."""
    manifest = manifest_of(exported)
    for name in ("layer_000.safetensors", "layer_001.safetensors"):
        file = exported / "compiled" / name
        save_file({TENSOR_NAME: load_file(file)[TENSOR_NAME]}, file)
        manifest["artifacts"][name]["bytes"] = file.stat().st_size
    change_manifest(exported, manifest)
    assert not NeuronOPTForCausalLM.from_pretrained(exported).runtime.captured._screens
    assert_sound(exported, by_unit=True)


def test_an_earlier_versions_library_is_not_loaded(exported, caplog):
    """Whatever it holds; a warning says so. tests/test_untrusted_exports.py has one whose code would be noticed."""
    shutil.rmtree(exported / "compiled")
    (exported / "compiled").mkdir()
    (exported / "compiled" / "kernels.so").write_bytes(b"code of whoever made this export")
    entry = {"bytes": 1, "sha256": "0" * 64}
    change_manifest(exported, {"host": {"torch": "2.1"}, "source": "0" * 64, "artifacts": {"kernels.so": entry}})
    caplog.clear()
    assert_sound(exported, by_unit=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "kernels.so, which is not loaded: an export for cpu is data" in warnings[0]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("layer_001.safetensors", TENSOR_NAME), ("layer_000.safetensors", "fc1.error"), (HEAD, "lm_head.weight_int8")],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "other tensor", "other shape"])
def test_damaged_files(damage, name, tensor, exported):
    file = exported / "compiled" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"0")
    elif damage == "other tensor":
        file.write_bytes(content.replace(tensor.encode(), tensor[::-1].encode()))
    else:
        save_file({**load_file(file), tensor: torch.zeros(3, 3, dtype=torch.float16)}, file)
        manifest = manifest_of(exported)
        manifest["artifacts"][file.name]["bytes"] = file.stat().st_size
        change_manifest(exported, manifest)
    with pytest.raises(CheckpointError, match=rf"{name}.*[Ee]xport the model again"):
        NeuronOPTForCausalLM.from_pretrained(exported)
    generate(NeuronOPTForCausalLM.from_pretrained(exported, eager=True))  # the way out


def test_files_of_another_checkpoint(exported):
    manifest = manifest_of(exported)
    manifest["artifacts"]["layer_001.safetensors"]["checkpoint"] = "0" * 64
    change_manifest(exported, manifest)
    with pytest.raises(CheckpointError, match="was made from another checkpoint/layer_001.safetensors"):
        NeuronOPTForCausalLM.from_pretrained(exported)


def test_missing_manifest(exported):
    (exported / "compiled" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken.*export the model again"):
        NeuronOPTForCausalLM.from_pretrained(exported)
    generate(NeuronOPTForCausalLM.from_pretrained(exported, eager=True))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": 2}', '{"format": 2, "artifacts": ["x"]}'])
def test_broken_manifest(content, exported):
    (exported / "compiled" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="manifest.json is missing or broken"):
        NeuronOPTForCausalLM.from_pretrained(exported)
