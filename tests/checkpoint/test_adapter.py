"""LoRA adapters merged while splitting: the weights are those that PEFT merges."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands import optimum_cli
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_adapters import EVERYTHING, make_adapter
from small_blip2 import tiny_blip2
from small_models import KINDS, tiny_opt
from transformers import OPTForCausalLM, OPTForSequenceClassification

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import CheckpointError, source
from optimum_opt_trn.configuration_opt import normalize_adapters


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def merged_by_peft(model: OPTForCausalLM, *adapters: Path) -> dict[str, torch.Tensor]:
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


def assert_split_is(directory: Path, expected: dict[str, torch.Tensor], amp: str) -> None:
    """The split checkpoint has these weights, rounded once, up to float32 rounding of the sum."""
    found = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in found.items():
        exact = expected[name]
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, exact, rtol=1e-6, atol=1e-6)
        else:
            assert tensor.dtype == DTYPES[amp]
            close = torch.finfo(tensor.dtype).eps  # a sum on the border may be rounded either way
            torch.testing.assert_close(tensor.float(), exact, rtol=close, atol=1e-6)
            assert (tensor != exact.to(tensor.dtype)).float().mean() < 0.01


SETTINGS: dict[str, dict[str, Any]] = {
    "all matrices": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {
        "rank_pattern": {"fc1": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"fc1": 9, r"layers\.1\.self_attn\.k_proj": 1, "q_proj": 2},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "wide": {"r": 70},
}


@pytest.mark.parametrize("kind", ["pre_norm", "post_norm", "galactica"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_merges_as_peft(tmp_path, kind, setting):
    model = tiny_opt(**KINDS[kind])
    model.save_pretrained(tmp_path / "source")
    adapter = make_adapter(tmp_path / "adapter", model, **SETTINGS[setting])
    expected = merged_by_peft(tiny_opt(**KINDS[kind]), adapter)
    for amp in DTYPES:
        save_pretrained_split(tmp_path / "source", tmp_path / amp, amp=amp, adapter=adapter)
        assert_split_is(tmp_path / amp, expected, amp)
    changed = [
        name
        for name, tensor in expected.items()
        if not torch.equal(tensor, tiny_opt(**KINDS[kind]).state_dict()[name])
    ]
    assert changed and all(name.rpartition(".weight")[0].rpartition(".")[2] in EVERYTHING for name in changed)


def test_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "CHUNK_BYTES", 3000)
    model = tiny_opt()
    adapter = make_adapter(tmp_path / "adapter", model)
    save_pretrained_split(tiny_opt(), tmp_path / "split", amp="f32", adapter=[adapter])
    assert_split_is(tmp_path / "split", merged_by_peft(tiny_opt(), adapter), "f32")


def test_several_with_weights(tmp_path):
    model, base = tiny_opt(), tiny_opt().state_dict()
    first, second = (make_adapter(tmp_path / f"{i}", model, seed=i, r=2 + i) for i in range(2))
    ones = [merged_by_peft(tiny_opt(), adapter) for adapter in (first, second)]
    model.save_pretrained(tmp_path / "source")
    save_pretrained_split(tmp_path / "source", tmp_path / "sum", amp="f32", adapter=[first, second])
    assert_split_is(tmp_path / "sum", merged_by_peft(tiny_opt(), first, second), "f32")
    expected = {
        name: base[name] + 0.5 * (ones[0][name] - base[name]) - 2 * (ones[1][name] - base[name]) for name in base
    }
    for number, adapter in enumerate(
        ({first: 0.5, second: -2}, [f"{first}=0.5", f"{second}=-2"], [(first, 0.5), (second, -2)])
    ):
        save_pretrained_split(tmp_path / "source", tmp_path / f"weighted-{number}", amp="f32", adapter=adapter)
        assert_split_is(tmp_path / f"weighted-{number}", expected, "f32")


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_an_export_generates_as_the_merged_model_and_says_what_it_is(tmp_path, tp_degree):
    model = tiny_opt()
    model.save_pretrained(tmp_path / "source")
    adapter = make_adapter(tmp_path / "adapter", model)
    options = {"eager": True, "sequence_length": 32, "amp": "f32", "tp_degree": tp_degree}
    ours = NeuronOPTForCausalLM.from_pretrained(tmp_path / "source", adapter=adapter, **options)
    reference, ids = tiny_opt(), torch.tensor([[5, 6, 7]])
    reference.load_state_dict(merged_by_peft(tiny_opt(), adapter))
    asked = {"max_new_tokens": 12, "no_repeat_ngram_size": 1}
    assert torch.equal(ours.generate(ids, **asked), reference.generate(ids, **asked))
    assert not torch.equal(ours.generate(ids, **asked), tiny_opt().generate(ids, **asked))
    ours.save_pretrained(tmp_path / "saved")
    assert OPTNeuronConfig.from_pretrained(tmp_path / "saved").adapter == (str(adapter),)
    NeuronOPTForCausalLM.from_pretrained(tmp_path / "saved", adapter=[adapter])
    with pytest.raises(ValueError, match="was exported with adapter="):
        NeuronOPTForCausalLM.from_pretrained(tmp_path / "saved", adapter={adapter: 2.0})


def test_a_split_with_another_adapter_is_written_again(tmp_path):
    """And of a split checkpoint only what no adapter changes is linked."""
    model = tiny_opt()
    model.save_pretrained(tmp_path / "source")
    first, second = (make_adapter(tmp_path / f"{i}", model, seed=i, target_modules=["fc1"]) for i in range(2))
    plain = save_pretrained_split(tmp_path / "source", tmp_path / "plain", amp="f32")
    for source_directory in (tmp_path / "source", plain):
        out = tmp_path / f"of-{source_directory.name}"
        for adapter in (None, first, second, {second: 3}):
            save_pretrained_split(source_directory, out, amp="f32", adapter=adapter)
            expected = tiny_opt().state_dict()
            if adapter is not None:
                weights = adapter if isinstance(adapter, dict) else {adapter: 1}
                for path, weight in weights.items():
                    merged = merged_by_peft(tiny_opt(), path)
                    expected = {name: tensor + weight * (merged[name] - tensor) for name, tensor in expected.items()}
            assert_split_is(out, expected, "f32")
    outer = "embeddings_and_head.safetensors"
    assert (tmp_path / "of-plain" / outer).samefile(plain / outer)


def test_adapters_of_other_forms(tmp_path):
    """In PyTorch's format; trained on a BLIP-2; of a decoder without head."""
    model = tiny_opt()
    adapter = make_adapter(tmp_path / "adapter", model)
    expected = merged_by_peft(tiny_opt(), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, old, new in (
        ("blip2", "base_model.model.", "base_model.model.language_model."),
        ("headless", "base_model.model.model.", "base_model.model."),
        ("pytorch", "", ""),
    ):
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / "adapter_model.safetensors").unlink()
        renamed = {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}
        if name == "pytorch":
            torch.save(renamed, tmp_path / name / "adapter_model.bin")
        else:
            save_file(renamed, tmp_path / name / "adapter_model.safetensors")
        save_pretrained_split(tiny_opt(), tmp_path / f"{name}-split", amp="f32", adapter=tmp_path / name)
        assert_split_is(tmp_path / f"{name}-split", expected, "f32")
    tiny_blip2().save_pretrained(tmp_path / "whole")
    save_pretrained_split(tmp_path / "whole", tmp_path / "whole-split", amp="f32", adapter=tmp_path / "blip2")
    assert_split_is(tmp_path / "whole-split", expected, "f32")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "is a DoRA"),
    "head": ({"target_modules": ["lm_head"]}, "has base_model.model.lm_head"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "has base_model.model.model.decoder.embed_tokens"),
    "saved module": ({"modules_to_save": ["final_layer_norm"]}, "has modules_to_save="),
    "biases": ({"bias": "lora_only"}, "has bias='lora_only'"),
    "bias of B": ({"lora_bias": True}, "has lora_bias=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "has trainable_token_indices="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, case):
    settings, message = REFUSED[case]
    adapter = make_adapter(tmp_path / "adapter", tiny_opt(), **settings)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained_split(tiny_opt(), tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_another_kind_of_adapter_is_refused(tmp_path):
    config = IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    get_peft_model(tiny_opt(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="is of type IA3, and only LORA can be merged"):
        save_pretrained_split(tiny_opt(), tmp_path / "out", adapter=tmp_path / "adapter")


def spoil(adapter: Path, how: str) -> None:
    config_file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights)
    first = sorted(tensors)[0]
    if how == "no config":
        config_file.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "broken weights":
        weights.write_bytes(b"\0" * 100)
    elif how == "unknown setting":
        config_file.write_text(json.dumps({**config, "use_new_trick": True}))
    elif how == "alpha":
        config_file.write_text(json.dumps({**config, "lora_alpha": "much"}))
    elif how == "pattern":
        config_file.write_text(json.dumps({**config, "alpha_pattern": {"(": 1}}))
    elif how == "half":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    elif how == "infinite":
        save_file({**tensors, first: tensors[first] * torch.inf}, weights)


SPOILT = {
    "no config": "no adapter_config.json",
    "no weights": "has no weights",
    "broken weights": "broken or not an adapter's",
    "unknown setting": "has use_new_trick=True, which is not merged here",
    "alpha": "broken adapter_config.json",
    "pattern": "broken adapter_config.json",
    "half": "lacks the lora_A",
    "infinite": "not finite",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_adapter_is_an_error_that_says_so(tmp_path, how):
    adapter = make_adapter(tmp_path / "adapter", tiny_opt())
    spoil(adapter, how)
    with pytest.raises(CheckpointError, match=SPOILT[how]):
        save_pretrained_split(tiny_opt(), tmp_path / "out", adapter=adapter)


def test_an_adapter_of_another_model_is_an_error(tmp_path):
    for name, overrides in (("wider", {"ffn_dim": 128}), ("deeper", {"num_hidden_layers": 3})):
        adapter = make_adapter(tmp_path / name, tiny_opt(**overrides))
        with pytest.raises(CheckpointError, match="is for another model"):
            save_pretrained_split(tiny_opt(), tmp_path / "out", adapter=adapter)
    with torch.random.fork_rng():
        classifier = OPTForSequenceClassification(tiny_opt().config)
        adapter = make_adapter(tmp_path / "classifier", classifier, task_type="SEQ_CLS")
    with pytest.raises(CheckpointError, match="modules_to_save=.*'score'"):
        save_pretrained_split(tiny_opt(), tmp_path / "out", adapter=adapter)
    with pytest.raises(OSError, match="The adapter nowhere/at-all is not a local directory, and cannot be fetched"):
        save_pretrained_split(tiny_opt(), tmp_path / "out", adapter="nowhere/at-all", local_files_only=True)


def test_the_commands_take_adapters(tmp_path, monkeypatch, capsys):
    tiny_opt().save_pretrained(tmp_path / "source")
    adapter = make_adapter(tmp_path / "adapter", tiny_opt())
    merged = merged_by_peft(tiny_opt(), adapter)
    base = tiny_opt().state_dict()
    doubled = {name: tensor + 2 * (merged[name] - tensor) for name, tensor in base.items()}
    more = ["--auto_cast_type", "fp32", "--adapter"]
    split = ["optimum-cli", "neuron", "split", "-m", tmp_path / "source", *more, f"{adapter}=2", tmp_path / "split"]
    export = [
        "optimum-cli",
        "export",
        "neuron",
        "-m",
        tmp_path / "source",
        "--eager",
        *more,
        adapter,
        tmp_path / "export",
    ]
    for command in (split, export):
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        optimum_cli.main()
    assert_split_is(tmp_path / "split", doubled, "f32")
    assert_split_is(tmp_path / "export" / "checkpoint", merged, "f32")
    assert OPTNeuronConfig.from_pretrained(tmp_path / "export").adapter == (str(adapter),)


def test_forms_of_the_option():
    assert normalize_adapters(None) == normalize_adapters([]) == ()
    assert normalize_adapters("a") == normalize_adapters(Path("a")) == normalize_adapters({"a": 1}) == ("a",)
    assert normalize_adapters("a=0.5") == normalize_adapters([("a", 0.5)]) == ("a=0.5",)
    assert normalize_adapters(("a", "b=-2")) == ("a", "b=-2.0")
    assert normalize_adapters("a=b") == ("a=b",)
    assert normalize_adapters({"a=2": 1}) == ("a=2=1.0",)
    for wrong in ({"a": float("nan")}, {"a": "much"}, {"a": True}, "a=inf", ["a", "a=2"], ""):
        with pytest.raises(ValueError, match="adapter="):
            normalize_adapters(wrong)
    with pytest.raises(TypeError, match="not 3"):
        normalize_adapters([3])
