"""Values of config.json that no OPT has are told before anything is exported."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, tiny_config

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.checkpoint.config import check_values, load_config


WRONG = {
    "heads": ({"num_attention_heads": 5}, "num_attention_heads=5, and it must divide hidden_size=64"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0, and it must be a positive whole number"),
    "text": ({"hidden_size": "big"}, "hidden_size='big', and it must be a positive whole number"),
    "null": ({"num_hidden_layers": None}, "num_hidden_layers=None, and it must be a positive"),
    "a list": ({"ffn_dim": []}, r"ffn_dim=\[\], and it must be a positive"),
    "a fraction": ({"vocab_size": 1.5}, "vocab_size=1.5, and it must be a positive"),
    "true": ({"max_position_embeddings": True}, "max_position_embeddings=True, and it must be a positive"),
    "activation": ({"activation_function": "swoosh"}, "activation_function='swoosh', and OPT has 'relu'"),
    "activation of no name": ({"activation_function": []}, "activation_function="),
    "end": ({"eos_token_id": "x"}, "eos_token_id='x', and it must be the number of a token, or null"),
    "ends": ({"eos_token_id": [2, "x"]}, r"eos_token_id=\[2, 'x'\]"),
    "pad": ({"pad_token_id": [1]}, r"pad_token_id=\[1\]"),
    "switch": ({"do_layer_norm_before": "yes"}, "do_layer_norm_before='yes', and it must be true or false"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config, of 'gptq'. Choose"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named_with_its_limit(case, tmp_path):
    changes, message = WRONG[case]
    values = {**tiny_config().to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        NeuronOPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_the_family_passes(kind):
    check_values(tiny_config(**KINDS[kind]).to_dict(), "a model")
    check_values(tiny_config(**KINDS[kind], eos_token_id=[2, 3], pad_token_id=None).to_dict(), "a model")
    check_values({}, "a model")


NAMES = sorted(name for name in tiny_config().to_dict() if name not in ("model_type", "transformers_version"))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NAMES), st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.just([]))
def test_any_value_passes_or_is_a_value_error(name, value):
    try:
        check_values({**tiny_config().to_dict(), name: value}, "a model")
    except ValueError as error:
        assert str(error).startswith("a model")
