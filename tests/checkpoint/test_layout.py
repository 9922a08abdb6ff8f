"""The layout's names and shapes are those of transformers' OPTForCausalLM."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, no_init_weights, tiny_config
from transformers import OPTConfig, OPTForCausalLM

from optimum_opt_trn.checkpoint.layout import (
    INDEX_NAME,
    OUTER_FILE,
    TensorSpec,
    checkpoint_files,
    has_int8_head,
    layer_file,
    layer_prefix,
    layer_specs,
    outer_specs,
)
from optimum_opt_trn.checkpoint.quantization import quantization_config
from optimum_opt_trn.checkpoint.small_files import save_config
from optimum_opt_trn.dtypes import AMP_DTYPES, DTYPES, to_torch


@st.composite
def configs(draw) -> OPTConfig:
    heads = draw(st.integers(1, 4))
    hidden = heads * draw(st.integers(1, 8))
    return OPTConfig(
        vocab_size=draw(st.integers(3, 60)),
        hidden_size=hidden,
        num_attention_heads=heads,
        word_embed_proj_dim=draw(st.sampled_from([hidden, 5])),
        ffn_dim=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        max_position_embeddings=draw(st.integers(1, 50)),
        do_layer_norm_before=draw(st.booleans()),
        _remove_final_layer_norm=draw(st.booleans()),
        enable_bias=draw(st.booleans()),
        layer_norm_elementwise_affine=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def assert_layout_is_that_of_transformers(config: OPTConfig) -> None:
    with no_init_weights(), torch.device("meta"):
        model = OPTForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    files = checkpoint_files(config, "f16")
    ours = {name: spec.shape for specs in files.values() for name, spec in specs.items()}
    assert ours == expected
    assert sum(map(len, files.values())) == len(ours)  # no tensor is in two files


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    assert_layout_is_that_of_transformers(tiny_config(**KINDS[kind]))


@settings(deadline=None, max_examples=30)
@given(configs())
def test_any_combination(config):
    assert_layout_is_that_of_transformers(config)


@pytest.mark.parametrize("kind", KINDS)
def test_layernorms_and_positions_stay_float32(kind):
    for amp in AMP_DTYPES:
        for specs in checkpoint_files(tiny_config(**KINDS[kind]), amp).values():
            for name, spec in specs.items():
                kept = "layer_norm" in name or "embed_positions" in name
                assert spec.dtype == ("f32" if kept else amp), name


IGNORED, KEPT = quantization_config(head=False), quantization_config(head=True)


def changed(**values) -> dict:
    return {**KEPT, **values}


def targets(*names) -> dict:
    return changed(config_groups={"group_0": {**KEPT["config_groups"]["group_0"], "targets": [*names]}})


@pytest.mark.parametrize(
    ("quantization", "tied", "expected"),
    [
        (None, True, True),
        (None, False, True),
        (KEPT, False, True),
        (KEPT, True, False),  # of its own it has no head
        (IGNORED, True, False),
        (IGNORED, False, False),
        (changed(ignore=["re:.*lm_head"]), False, False),
        (changed(ignore=["re:head"]), False, True),  # a pattern matches from the beginning
        (changed(ignore=["Linear"]), False, False),
        (changed(ignore=None), False, True),
        (targets("re:.*self_attn.*", "re:.*fc[12]"), False, False),
        (targets("re:.*fc[12]", "lm_head"), False, True),
    ],
)
def test_the_head_is_int8_unless_the_source_has_it_in_16_bits(quantization, tied, expected, tmp_path):
    config = tiny_config(tie_word_embeddings=tied)
    if quantization is not None:
        config.quantization_config = quantization
    assert has_int8_head(config, "int8") == expected
    assert not has_int8_head(config, None)
    specs = outer_specs(config, "f16", "int8")
    assert specs["model.decoder.embed_tokens.weight"].dtype == "f16"
    if expected:
        assert (specs["lm_head.weight"].dtype, specs["lm_head.weight"].shape) == ("int8", (128, 64))
        assert (specs["lm_head.weight_scale"].dtype, specs["lm_head.weight_scale"].shape) == ("f32", (128, 1))
    else:
        assert "lm_head.weight_scale" not in specs and ("lm_head.weight" in specs) == (not tied)
    # What is written says of itself what was written.
    save_config(config, "f16", tmp_path, "int8")
    saved = OPTConfig.from_pretrained(tmp_path)
    assert has_int8_head(saved, "int8") == expected and saved.tie_word_embeddings == (tied and not expected)


def test_one_file_a_layer_and_one_for_the_rest():
    config = tiny_config(num_hidden_layers=3)
    files = checkpoint_files(config, "bf16")
    assert list(files) == [OUTER_FILE, "layer_000.safetensors", "layer_001.safetensors", "layer_002.safetensors"]
    assert files[OUTER_FILE] == outer_specs(config, "bf16")
    for index in range(3):
        assert layer_file(index) == f"layer_{index:03d}.safetensors"
        assert layer_prefix(index) == f"model.decoder.layers.{index}."
        layer = layer_specs(config, "bf16")
        assert files[layer_file(index)] == {layer_prefix(index) + name: spec for name, spec in layer.items()}
    assert INDEX_NAME == "model.safetensors.index.json"  # where transformers looks for it


@pytest.mark.parametrize("name", DTYPES)
def test_specs_are_values_and_know_their_bytes(name):
    spec = TensorSpec((2, 3), name)
    assert spec == TensorSpec((2, 3), name) != TensorSpec((3, 2), name)
    assert spec.bytes == torch.empty(2, 3).to(to_torch(name)).nbytes
