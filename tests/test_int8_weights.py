"""Exports with int8 weights, compared with transformers on the matrices that numpy quantized."""

import json

import pytest
import torch
from against_transformers import ragged
from safetensors.torch import load_file
from small_models import KINDS, SHIPPED_MODEL, dequantized, tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.planning.memory import checkpoint_bytes
from optimum_opt_trn.planning.setup import Setup


OPTIONS = {"batch_size": 3, "sequence_length": 64, "amp": "f32", "weight_dtype": "int8"}


@pytest.mark.parametrize("eager", [False, True], ids=["kernels", "eager"])
@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_are_transformers(kind, tp_degree, eager, tmp_path):
    source = tiny_opt(**KINDS[kind])
    source.save_pretrained(tmp_path)
    ours = NeuronOPTForCausalLM.from_pretrained(tmp_path, **OPTIONS, tp_degree=tp_degree, eager=eager)
    theirs, inputs = dequantized(source), ragged([9, 3, 20])
    with torch.inference_mode():
        expected = theirs(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**inputs).logits[real], expected[real], atol=1e-3, rtol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


def test_an_export_holds_int8(tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, weight_dtype="int8", sequence_length=64)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "checkpoint" / "layer_003.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2 and "scale" not in name}
    assert len(matrices) == 6 and all(tensor.dtype == torch.int8 for tensor in matrices.values())
    assert load_file(tmp_path / "compiled" / "layer_003.safetensors")["fc2.weight_by_unit"].dtype == torch.int8
    config = json.loads((tmp_path / "neuron_config.json").read_text())
    assert (config["amp"], config["weight_dtype"]) == ("f16", "int8")
    files = (tmp_path / "checkpoint").glob("*.safetensors")
    planned = checkpoint_bytes(model.config, Setup.of(model.neuron_config))[0]
    assert sum(t.nbytes for file in files for t in load_file(file).values()) == planned

    ids = torch.tensor([[2, 50, 60, 70]])
    again = NeuronOPTForCausalLM.from_pretrained(tmp_path, weight_dtype="int8")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="was exported with weight_dtype='int8'"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path, weight_dtype="f16")


def test_logits_are_close_to_those_of_16_bits():
    inputs = ragged([60, 60], vocab_size=3072)
    models = (
        NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, batch_size=2, weight_dtype=w) for w in (None, "int8")
    )
    half, int8 = (model(**inputs).logits for model in models)
    assert torch.nn.functional.cosine_similarity(half, int8, dim=-1).min() > 0.9995


def test_a_checkpoint_in_int8_stays_so_unless_told(tmp_path):
    source = tiny_opt()
    source.save_pretrained(tmp_path / "source")
    first = NeuronOPTForCausalLM.from_pretrained(tmp_path / "source", **OPTIONS)
    first.save_pretrained(tmp_path / "export")
    checkpoint, ids = tmp_path / "export" / "checkpoint", torch.tensor([[5, 6, 7]])
    kept = NeuronOPTForCausalLM.from_pretrained(checkpoint, amp="f32")
    assert kept.neuron_config.weight_dtype == "int8"
    assert torch.equal(kept(ids).logits, first(ids).logits)
    whole = NeuronOPTForCausalLM.from_pretrained(checkpoint, amp="f32", weight_dtype="f32")
    assert whole.neuron_config.weight_dtype is None and not hasattr(whole.config, "quantization_config")
    torch.testing.assert_close(whole(ids).logits, first(ids).logits, atol=1e-4, rtol=1e-4)
    (tmp_path / "again").mkdir()
    kept.save_pretrained(tmp_path / "again")
    linked = tmp_path / "again" / "checkpoint" / "layer_000.safetensors"
    assert linked.read_bytes() == (checkpoint / "layer_000.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight_dtype": "int4"}, "weight_dtype='int4' is neither int8 nor amp='f16'"),
        ({"weight_dtype": "bf16"}, "weight_dtype='bf16' is neither int8 nor amp='f16'"),
    ],
)
def test_what_exports_cannot_have(options, message):
    with pytest.raises(ValueError, match=message):
        OPTNeuronConfig(**options)
    assert OPTNeuronConfig(weight_dtype="fp16").weight_dtype is None
    assert OPTNeuronConfig(weight_dtype=torch.int8, instance_type="trn1").weight_dtype == "int8"
