"""What an export for `cpu` has in compiled/: fc2 by unit, copies of fc1 and the head, checked at load, and no code."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import KINDS, SHIPPED_MODEL, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets.cpu.artifacts import TENSOR_NAME
from optimum_opt_trn.targets.cpu.coded import encode
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


# Of these, rows of matrices have whole blocks (csrc/coded_format.h).
WIDE = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 384}
MATRICES = ["fc1.weight", *(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out"))]


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("kind", ["pre_norm", "post_norm", "galactica", "untied"])
def test_bfloat16_layers_are_stored_coded(kind, tp_degree, save_opt, tmp_path):
    opt = tiny_opt(**{**WIDE, **KINDS[kind]})
    output = export(save_opt(opt), tmp_path, amp="bf16", tp_degree=tp_degree)
    relu = opt.config.activation_function == "relu"
    fc2 = TENSOR_NAME if relu else "fc2.weight"
    names = {f"{name}_coded" for name in (*MATRICES, fc2)}
    for index in range(opt.config.num_hidden_layers):
        stored = load_file(output / "compiled" / f"layer_{index:03}.safetensors")
        int8 = {"fc1.weight_int8", "fc1.weight_scale", "fc1.error", "fc1.length"} if relu else set()
        assert set(stored) == names | int8
        weights = load_file(output / "checkpoint" / f"layer_{index:03}.safetensors")
        for name in (*MATRICES, "fc2.weight"):
            weight = weights[f"model.decoder.layers.{index}.{name}"]
            if name == "fc2.weight" and relu:
                assert torch.equal(stored[f"{fc2}_coded"], encode(weight.T.contiguous()))
            else:
                assert torch.equal(stored[f"{name}_coded"], encode(weight))
    model = NeuronOPTForCausalLM.from_pretrained(output)
    for layer in model.runtime.weights.layers:
        for name in (*MATRICES, "fc2.weight"):
            found = model.runtime.program.arithmetic.coded.find(layer[name])
            # Parts of rows are no coded rows; of fc2 by unit, ranks have whole ones.
            whole = tp_degree == 1 or name not in ("self_attn.out_proj.weight", "fc2.weight")
            assert len(found) == (tp_degree if whole or (relu and name == "fc2.weight") else 0)
            assert all(copy.by_unit == (relu and name == "fc2.weight") for copy in found)
    assert_sound(output, by_unit=False)


def test_a_matrix_with_many_exponents_is_stored_as_it_is(save_opt, tmp_path):
    """Rows of it have no place for so many weights that are much smaller than others."""
    opt = tiny_opt(**WIDE)
    with torch.no_grad():
        for weight in (opt.model.decoder.layers[0].fc2.weight, opt.model.decoder.layers[1].self_attn.q_proj.weight):
            weight.mul_(10.0 ** -torch.randint(0, 30, weight.shape))
    output = export(save_opt(opt), tmp_path, amp="bf16")
    first, second = (load_file(output / "compiled" / f"layer_00{index}.safetensors") for index in (0, 1))
    assert TENSOR_NAME in first and TENSOR_NAME not in second
    assert {*first} ^ {*second} == {TENSOR_NAME, f"{TENSOR_NAME}_coded", "self_attn.q_proj.weight_coded"}
    model, eager = (NeuronOPTForCausalLM.from_pretrained(output, eager=eager) for eager in (False, True))
    assert torch.equal(generate(model), generate(eager))


def test_where_memory_is_short_only_fc2_is_read_coded(save_opt, tmp_path, monkeypatch):
    output = export(save_opt(tiny_opt(**WIDE)), tmp_path, amp="bf16")
    monkeypatch.setattr("optimum_opt_trn.targets.cpu.host_memory", lambda: (1 << 40, 1 << 20))
    model = NeuronOPTForCausalLM.from_pretrained(output)
    for layer in model.runtime.weights.layers:
        assert [name for name in layer if model.runtime.program.arithmetic.coded.find(layer[name])] == ["fc2.weight"]
    assert not model.runtime.captured._screens
    assert_sound(output, by_unit=False)


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
