"""Weights in int8, compared with numpy, and with compressed-tensors, which reads and writes the same checkpoints."""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import KINDS, dequantized, tiny_config, tiny_opt
from transformers import OPTForCausalLM

from optimum_opt_trn.checkpoint import CheckpointError, layout, save_pretrained_split, small_files, verify_checkpoint
from optimum_opt_trn.checkpoint import source as source_module
from optimum_opt_trn.checkpoint.config import load_config
from optimum_opt_trn.checkpoint.hub import open_checkpoint
from optimum_opt_trn.checkpoint.layout import checkpoint_files
from optimum_opt_trn.checkpoint.quantization import (
    quantization_config,
    quantization_problem,
    quantize,
    scales,
    signed,
    unpack,
)


FC1 = "model.decoder.layers.0.fc1.weight"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(1e-6, 1e4), st.integers(0, 2**31))
def test_the_error_is_at_most_half_a_step(rows, columns, spread, seed):
    matrix = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale, values = scales(matrix), quantize(matrix)
    assert scale.shape == (rows, 1) and values.dtype == torch.int8
    assert ((values * scale - matrix).abs() <= scale * 0.501).all()
    assert (values.abs().amax(1) == 127).all()


def test_a_row_of_zeros_stays():
    matrix = torch.tensor([[0.0, 0.0], [0.5, -1.0]])
    assert torch.equal(quantize(matrix) * scales(matrix), torch.tensor([[0, 0], [64 / 127, -1.0]]))


def written(directory) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_was_split(kind, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, ids = tiny_opt(**KINDS[kind]), torch.randint(4, 128, (2, 9))
    save_pretrained_split(model, tmp_path, amp="f32", weight_dtype="int8")
    verify_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "lm_head" not in config["quantization_config"]["ignore"]
    theirs = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.get_input_embeddings().weight, model.get_input_embeddings().weight)
    save_pretrained_split(theirs, tmp_path / "again", amp="f32", weight_dtype="int8")  # what transformers has loaded
    again, first = written(tmp_path / "again"), written(tmp_path)
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    with torch.inference_mode():
        logits, expected = theirs(ids).logits, dequantized(model)(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def compressed(kind: str, directory, ignore=("lm_head",), dtype=torch.float32, form="int-quantized") -> OPTForCausalLM:
    """Writes what compressed-tensors makes of a model; returns the model before."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_opt(**KINDS[kind]).to(dtype)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    scheme = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=list(ignore),
        quantization_status="frozen",
        format=form,
    )
    apply_quantization_config(model, scheme)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            low, high = module.weight.amin(1, keepdim=True), module.weight.amax(1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(low, high, module.quantization_scheme.weights)[0])
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor(quantization_config=scheme)
    compressor.compress_model(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["OPTForCausalLM"]
    model.config.save_pretrained(directory)
    compressor.update_config(str(directory))
    return tiny_opt(**KINDS[kind])


@pytest.mark.parametrize("kind", ["post_norm", "odd_vocabulary", "untied"])
@pytest.mark.parametrize("form", ["loaded", "file", "copy of a tied head"])
def test_the_head_is_quantized_also_where_it_is_tied(kind, form, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 4096)  # in several chunks
    model = tiny_opt(**KINDS[kind])
    head = model.lm_head.weight.detach().numpy()
    source = model
    if form != "loaded":
        source = tmp_path / "source"
        model.save_pretrained(source)
    if form == "copy of a tied head" and kind != "untied":  # of which transformers takes the embedding, too
        file = source / "model.safetensors"
        tensors = {**load_file(file), "lm_head.weight": torch.ones(head.shape)}
        save_file(tensors, file, metadata={"format": "pt"})
    save_pretrained_split(source, tmp_path / "split", "f16", weight_dtype="int8")
    verify_checkpoint(tmp_path / "split")
    tensors, scale = written(tmp_path / "split"), np.abs(head).max(1, keepdims=True) / np.float32(127)
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert np.array_equal(tensors["lm_head.weight"], np.rint(head / scale))
    assert np.array_equal(tensors["lm_head.weight_scale"], scale)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    assert torch.equal(embedding, model.get_input_embeddings().weight.half())


def test_an_int8_head_is_kept_and_multiplied_out(tmp_path):
    """A split checkpoint as a source: the same files again; in 16 bits an untied head, its scales multiplied out."""
    save_pretrained_split(tiny_opt(vocab_size=203), tmp_path / "first", "f32", weight_dtype="int8")
    first = written(tmp_path / "first")
    save_pretrained_split(tmp_path / "first", tmp_path / "again", "f32", weight_dtype="int8")
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.samefile(tmp_path / "again" / file.name)
    save_pretrained_split(tmp_path / "first", tmp_path / "whole", "f32")
    whole, config = written(tmp_path / "whole"), load_config(tmp_path / "whole")
    assert torch.equal(whole["lm_head.weight"], first["lm_head.weight"] * first["lm_head.weight_scale"])
    assert not config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert not any("scale" in name for name in whole)


@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("weight_dtype", ["int8", None])
def test_a_quantized_head_of_compressed_tensors_is_read(weight_dtype, form, tmp_path):
    pytest.importorskip("compressed_tensors")
    (tmp_path / "source").mkdir()
    model = compressed("untied", tmp_path / "source", ignore=(), form=form)
    save_pretrained_split(tmp_path / "source", tmp_path / "split", "f32", weight_dtype=weight_dtype)
    head, stored = written(tmp_path / "split"), written(tmp_path / "source")
    scale = stored["lm_head.weight_scale"].float()
    if weight_dtype == "int8":
        assert torch.equal(head["lm_head.weight_scale"], scale)
        if form == "int-quantized":
            assert torch.equal(head["lm_head.weight"], stored["lm_head.weight"])
        head["lm_head.weight"] = head["lm_head.weight"] * scale
    # compressed-tensors' scales are the largest magnitude over 127.5.
    assert (head["lm_head.weight"] - model.lm_head.weight).abs().max() < scale.max()
    theirs = OPTForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    again = OPTForCausalLM.from_pretrained(tmp_path / "split", dtype=torch.float32)
    ids = torch.randint(4, 128, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pre_norm", "untied"])
def test_a_head_in_16_bits_stays_so_where_matrices_are_int8(kind, tmp_path):
    pytest.importorskip("compressed_tensors")
    (tmp_path / "source").mkdir()
    compressed(kind, tmp_path / "source", dtype=torch.float16)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    save_pretrained_split(tmp_path / "source", tmp_path / "split", "f16", weight_dtype="int8")
    verify_checkpoint(tmp_path / "split")
    tensors, config = written(tmp_path / "split"), load_config(tmp_path / "split")
    assert config.tie_word_embeddings == (kind == "pre_norm") and "lm_head" in config.quantization_config["ignore"]
    assert ("lm_head.weight" in tensors) == (kind == "untied") and "lm_head.weight_scale" not in tensors
    for name in ("lm_head.weight", "model.decoder.embed_tokens.weight", FC1):
        assert name not in tensors or torch.equal(tensors[name], stored[name])


def test_a_split_of_an_earlier_version_is_written_again(tmp_path):
    """The same command over int8 layers with a tied head in float16: the head becomes int8, and layers stay."""
    model = tiny_opt()
    model.save_pretrained(tmp_path / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "has_int8_head", lambda config, weight_dtype: False)
        patch.setattr(small_files, "has_int8_head", lambda config, weight_dtype: False)
        save_pretrained_split(tmp_path / "source", tmp_path / "split", weight_dtype="int8")
    assert load_config(tmp_path / "split").quantization_config == quantization_config(head=False)
    verify_checkpoint(tmp_path / "split")
    before = (tmp_path / "split" / "layer_000.safetensors").stat()
    assert "lm_head.weight" not in written(tmp_path / "split")
    save_pretrained_split(tmp_path / "source", tmp_path / "split", weight_dtype="int8")
    verify_checkpoint(tmp_path / "split")
    assert written(tmp_path / "split")["lm_head.weight"].dtype == torch.int8
    assert load_config(tmp_path / "split").quantization_config == quantization_config()
    after = (tmp_path / "split" / "layer_000.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def packed_by_hand(values: torch.Tensor) -> torch.Tensor:
    """As the format has it, in Python's whole numbers: four values plus 128 in 32 bits, the first in the lowest."""
    rows = []
    for row in values.tolist():
        row += [-128] * (-len(row) % 4)
        words = [sum((v + 128) << 8 * i for i, v in enumerate(row[at : at + 4])) for at in range(0, len(row), 4)]
        rows.append([word - (word >> 31 << 32) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@given(st.integers(1, 5), st.integers(1, 41), st.integers(0, 2**31))
def test_packed_values_are_read(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    read = signed(unpack(packed_by_hand(values), columns))
    assert read.dtype == torch.int8 and read.is_contiguous() and torch.equal(read, values)


@pytest.mark.parametrize("weight_dtype", ["int8", None])
@pytest.mark.parametrize("kind, dtype", [("pre_norm", torch.float32), ("post_norm", torch.float16)])
def test_packed_checkpoints_are_read_as_unpacked_ones(kind, dtype, weight_dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    for form in ("int-quantized", "pack-quantized"):
        (tmp_path / form).mkdir()
        compressed(kind, tmp_path / form, dtype=dtype, form=form)
        save_pretrained_split(tmp_path / form, tmp_path / f"split-{form}", "f32", weight_dtype=weight_dtype)
    names = load_file(tmp_path / "pack-quantized" / "model.safetensors")
    assert names[f"{FC1}_packed"].dtype == torch.int32 and f"{FC1}_shape" in names and FC1 not in names
    read = [written(tmp_path / name) for name in ("split-int-quantized", "split-pack-quantized")]
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(read[0][name], read[1][name]) for name in read[0])


@pytest.mark.parametrize("wrong", [torch.zeros(96, 17), torch.zeros(96, 17).int(), torch.zeros(95, 16).int()])
def test_packed_matrices_are_checked(wrong, tmp_path):
    pytest.importorskip("compressed_tensors")
    compressed("pre_norm", tmp_path, form="pack-quantized")
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), f"{FC1}_packed": wrong}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"fc1.weight_packed is .* makes it torch.int32 \(96, 16\)"):
        open_checkpoint(tmp_path, checkpoint_files(tiny_config(), "f32"))


@pytest.mark.parametrize("weight_dtype", ["int8", None])
@pytest.mark.parametrize("kind, dtype", [("pre_norm", torch.float32), ("post_norm", torch.bfloat16)])
def test_checkpoints_of_compressed_tensors_are_read(kind, dtype, weight_dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    (tmp_path / "source").mkdir()
    compressed(kind, tmp_path / "source", dtype=dtype)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    save_pretrained_split(tmp_path / "source", tmp_path / "split", "f32", weight_dtype=weight_dtype)
    made = written(tmp_path / "split")
    if weight_dtype == "int8":
        assert torch.equal(made[FC1], stored[FC1])
        assert torch.equal(made[f"{FC1}_scale"], stored[f"{FC1}_scale"].float())
    else:
        assert torch.equal(made[FC1], stored[FC1] * stored[f"{FC1}_scale"].float())
        assert not hasattr(load_config(tmp_path / "split"), "quantization_config")
    if kind == "post_norm":  # their Linear layers have project_in too, which ours keeps in amp
        name = "model.decoder.project_in.weight"
        assert stored[name].dtype == torch.int8 and made[name].dtype == torch.float32
        assert torch.equal(made[name], stored[name] * stored[f"{name}_scale"].float())


def test_scales_are_checked(tmp_path):
    model = tiny_opt()
    save_pretrained_split(model, tmp_path, "f32", weight_dtype="int8")
    file = tmp_path / "layer_000.safetensors"
    tensors = load_file(file)
    for wrong in (torch.zeros(96, 1), torch.full((96, 1), float("nan")), torch.ones(95, 1)):
        save_file({**tensors, f"{FC1}_scale": wrong}, file, metadata={"format": "pt"})
        files = checkpoint_files(load_config(tmp_path), "f16")
        with pytest.raises(CheckpointError, match="the scales of .*fc1.weight"):
            open_checkpoint(tmp_path, files).weights.read(FC1)
    del tensors[f"{FC1}_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="dtype torch.int8, not a floating-point dtype"):
        open_checkpoint(tmp_path, files).weights.read(FC1)


def changed(**values):
    config = json.loads(json.dumps(quantization_config()))
    weights = config["config_groups"]["group_0"]["weights"]
    for name, value in values.items():
        (weights if name in weights else config)[name] = value
    return config


@pytest.mark.parametrize(
    "quantization, message",
    [
        (changed(quant_method="gptq"), "of 'gptq'"),
        (changed(format="float-quantized"), "in format 'float-quantized'"),
        (changed(num_bits=4), "with weights in int4, symmetric, by channel"),
        (changed(symmetric=False), "with weights in int8, asymmetric, by channel"),
        (changed(strategy="group"), "int8, symmetric, by group"),
        (changed(type="float"), "in float8"),
        (changed(config_groups={}), "without config_groups"),
        (changed(kv_cache_scheme={"num_bits": 8}), "with a quantized cache"),
        (changed(sparsity_config={"format": "sparse-24"}), "transformed or sparse"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "cannot be read (KeyError"),
        (changed(ignore=["re:lm_(head"]), "cannot be read (PatternError" if sys.version_info >= (3, 13) else "(error"),
        (changed(ignore=["re:lm{99999999999}"]), "cannot be read (OverflowError"),
        (changed(ignore=[7]), "cannot be read (AttributeError"),
        ("gptq", "cannot be read"),
    ],
)
def test_other_schemes_are_refused(quantization, message):
    problem = quantization_problem(quantization)
    assert message in problem and "int8 weights, symmetric" in problem


def test_a_format_of_one_group_is_checked():
    config = changed(format="pack-quantized")
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert quantization_problem(config) is None
    config["config_groups"]["group_0"]["format"] = "nvfp4-pack-quantized"
    assert "in format 'nvfp4-pack-quantized'" in quantization_problem(config)


def test_quantized_activations_are_refused():
    config = changed()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    assert "with quantized activations" in quantization_problem(config)
    assert quantization_problem(quantization_config()) is None
    assert quantization_problem(changed(format="pack-quantized")) is None
