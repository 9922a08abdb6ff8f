"""int8 weights on the double, compared with transformers on matrices that numpy quantized; run by test_target.py."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import double


double.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from double import runtime as cores  # noqa: E402
from double_cases import GREEDY, export, neuron_host, ragged  # noqa: E402, F401  a fixture
from small_models import KINDS, dequantized, rounded, tiny_opt, untied  # noqa: E402

from optimum_opt_trn import NeuronOPTForCausalLM, modeling_neuron_opt  # noqa: E402
from optimum_opt_trn.compat.transformers_neuronx import (  # noqa: E402
    NeuronConfig,
    OPTForSampling,
    QuantizationConfig,
)
from optimum_opt_trn.hardware import INSTANCES  # noqa: E402
from optimum_opt_trn.planning.memory import plan_memory  # noqa: E402
from optimum_opt_trn.planning.setup import Setup  # noqa: E402


BUCKETS = {"prompt_buckets": (48,), "cache_buckets": (48,)}


def reference_of(model, amp: torch.dtype = torch.float32):
    """float32 arithmetic on int8 matrices with float32 scales, all else rounded to `amp`."""
    exact, reference = dequantized(copy.deepcopy(model)), untied(rounded(model, amp))
    matrices = {
        name: p
        for name, p in exact.named_parameters()
        if name == "lm_head.weight" or (".layers." in name and p.dim() == 2)
    }
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(matrices.get(name, parameter))
    return reference


@pytest.mark.parametrize(
    ("kind", "tp"),
    [*(("odd_vocabulary", tp) for tp in (1, 2, 4)), ("post_norm", 2), ("galactica", 4), ("untied", 2)],
)
def test_tokens_and_logits_are_transformers(kind, tp, tmp_path):
    model = tiny_opt(**KINDS[kind])
    prompts, reference = ragged(128), reference_of(model)
    loaded = NeuronOPTForCausalLM.from_pretrained(
        export(tmp_path, model, amp="f32", weight_dtype="int8", tp_degree=tp, **BUCKETS)
    )
    assert loaded.generate(**prompts, **GREEDY).tolist() == reference.generate(**prompts, **GREEDY).tolist()
    ours, expected = (one(**prompts).logits for one in (loaded, reference))
    real = prompts["attention_mask"].bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("amp", ["f16", "bf16"])
def test_16_bits_to_their_rounding(amp, tmp_path):
    model = tiny_opt()
    prompts = ragged(128)
    out = export(tmp_path, model, amp=amp, weight_dtype="int8", tp_degree=2, **BUCKETS)
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    eager = NeuronOPTForCausalLM.from_pretrained(out, eager=True)
    reference = reference_of(model, loaded.dtype)(**prompts).logits[:, -1]
    for ours in (loaded, eager):
        logits = ours(**prompts, logits_to_keep=1).logits[:, -1]
        assert (logits - reference).abs().max() < {"f16": 2e-2, "bf16": 16e-2}[amp] * reference.std()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_is_on_a_core_is_what_the_plan_counts(tp, tmp_path):
    out = export(tmp_path, tiny_opt(num_hidden_layers=3), weight_dtype="int8", tp_degree=tp, **BUCKETS)
    cores.staging = cores.Staging()
    loaded = NeuronOPTForCausalLM.from_pretrained(out)
    assert cores.staging.peak <= max(file.stat().st_size for file in (out / "checkpoint").glob("*.safetensors"))
    plan = plan_memory(loaded.config, Setup.of(loaded.neuron_config), INSTANCES["inf2.xlarge"])
    for placed in loaded.runtime.model.nxd_model.weights:
        weights = {name: tensor for name, tensor in placed.items() if name != "ranks"}
        assert sum(tensor.nbytes for tensor in weights.values()) == sum(plan.weights.values())
        matrices = [t for name, t in weights.items() if name.startswith("layer_") and t.dim() == 2 and t.shape[1] > 1]
        assert len(matrices) == 3 * 6 and all(tensor.dtype == torch.int8 for tensor in matrices)
        assert weights["head__lm_head__weight"].dtype == torch.int8
        assert weights["head__lm_head__weight"].shape == (128 // tp, 64)
        assert weights["head__lm_head__weight_scale"].shape == (128 // tp, 1)
        assert weights["embed__embed_tokens__weight"].dtype == torch.float16
        assert weights["layer_0__fc1__weight_scale"].shape == (96 // tp, 1)
        assert weights["layer_0__fc2__weight_scale"].shape == (64, 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_head_in_amp_beside_int8_layers(tp, tmp_path):
    """As earlier versions wrote it, and llm-compressor does: tied, and read as the embedding."""
    exported = Path(__file__).parents[2] / "data" / "exports" / "6-int8-matrices" / "checkpoint"
    shape = {"batch_size": 1, "sequence_length": 32, "prompt_buckets": (32,), "cache_buckets": (32,)}
    cpu = NeuronOPTForCausalLM.from_pretrained(exported, instance_type="cpu", amp="f32", sequence_length=32)
    loaded = NeuronOPTForCausalLM.from_pretrained(
        exported, instance_type="inf2", amp="f32", tensor_parallel_size=tp, **shape
    )
    names = loaded.runtime.model.nxd_model.weights[0]
    assert "head__lm_head__weight" not in names and names["layer_0__fc1__weight"].dtype == torch.int8
    ids = torch.tensor([[2, 5, 7]])
    assert loaded.generate(ids, **GREEDY).tolist() == cpu.generate(ids, **GREEDY).tolist()
    torch.testing.assert_close(loaded(ids).logits, cpu(ids).logits, atol=1e-4, rtol=1e-4)


def test_sources_in_int8(tmp_path):
    """An export for cpu, and a split checkpoint: int8 is kept unless another dtype is asked for."""
    model = tiny_opt()
    model.save_pretrained(tmp_path / "source")
    cpu = NeuronOPTForCausalLM.from_pretrained(
        tmp_path / "source", instance_type="cpu", amp="f32", weight_dtype="int8", batch_size=3, sequence_length=48
    )
    cpu.save_pretrained(tmp_path / "cpu")
    shape = {"instance_type": "inf2", "tensor_parallel_size": 2, "batch_size": 3, "sequence_length": 48, **BUCKETS}
    expected = cpu.generate(**ragged(128), **GREEDY).tolist()
    for given, weight_dtype in (({}, "int8"), ({"weight_dtype": "f32"}, None)):
        loaded = NeuronOPTForCausalLM.from_pretrained(tmp_path / "cpu" / "checkpoint", amp="f32", **shape, **given)
        assert loaded.neuron_config.weight_dtype == weight_dtype
        assert loaded.generate(**ragged(128), **GREEDY).tolist() == expected


@pytest.mark.parametrize(
    "how",
    [
        {"amp": "f32-u8-f32"},
        {"neuron_config": NeuronConfig(quant=QuantizationConfig(quant_dtype="s8", dequant_dtype="f32"))},
    ],
    ids=["amp", "quant"],
)
def test_old_scripts(how, tmp_path, monkeypatch):
    """On an instance, compat's names for int8 reach the graphs."""
    monkeypatch.setattr(modeling_neuron_opt, "get_neuron_major", lambda: 1)
    monkeypatch.setattr(modeling_neuron_opt, "get_instance_name", lambda: "inf2.xlarge\n")
    model = tiny_opt()
    model.save_pretrained(tmp_path)
    ours = OPTForSampling.from_pretrained(
        tmp_path, n_positions=48, batch_size=3, tp_degree=2, context_length_estimate=48, **how
    )
    ours.to_neuron()
    made = ours._model.neuron_config
    assert (made.instance_type, made.amp, made.weight_dtype) == ("inf2", "f32", "int8")
    ids = ragged(128)["input_ids"]
    with torch.inference_mode():
        expected = reference_of(model)(ids).logits[:, -1]
    torch.testing.assert_close(ours(ids), expected, atol=1e-3, rtol=1e-4)


def test_the_example_validates_int8(tmp_path, monkeypatch):
    import validate_on_trn

    monkeypatch.setattr(validate_on_trn, "TIMED_STEPS", 4)
    found = NeuronOPTForCausalLM.get_neuron_config
    monkeypatch.setattr(
        NeuronOPTForCausalLM,
        "get_neuron_config",
        lambda name, **options: found(name, **{**options, "instance_type": "inf2"}),
    )
    options = argparse.Namespace(
        output=tmp_path, cpu=False, batch_size=1, sequence_length=64, tensor_parallel_size=2, auto_cast_type="f16",
        weight_dtype="int8", switches=["none"],
    )  # fmt: skip
    model = Path(validate_on_trn.__file__).parent / "models" / "opt-austen"
    report = validate_on_trn.validate(str(model), options, "inf2.xlarge")
    assert report["export"]["neuron_config"]["weight_dtype"] == "int8"
    assert report["parity"]["passed"] and "cpu target" in report["parity"]["reference"]
    assert report["speed"]["decode_ms"] > 0
