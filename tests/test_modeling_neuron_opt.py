"""What users hold: loading, saving, and behaving as a model of transformers."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from small_models import rounded, tiny_opt

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM
from optimum_opt_trn.host_framework import INSTALLED


IDS = torch.tensor([[5, 6, 7]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 20}


@pytest.fixture
def export(load_opt, tmp_path):
    """A saved export of a tiny model."""
    load_opt(tiny_opt(), batch_size=2, sequence_length=64, kv_cache_dtype="f32").save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_saved_and_loaded_again(export):
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    assert model.neuron_config.sequence_length == 64
    assert torch.equal(model.generate(IDS, **GREEDY), rounded(tiny_opt()).generate(IDS, **GREEDY))


def test_export_gives_what_from_pretrained_gives(save_opt, tmp_path):
    source = save_opt()
    options = {"batch_size": 2, "sequence_length": 32, "tensor_parallel_size": 2, "kv_cache_dtype": "fp32"}
    config = NeuronOPTForCausalLM.get_neuron_config(source, **options)
    assert (config.tp_degree, config.amp, config.kv_cache_dtype, config.target) == (2, "f16", "f32", "cpu")
    model = NeuronOPTForCausalLM.export(source, config, load_weights=True, eager=True)
    assert model.neuron_config == config
    assert torch.equal(model.generate(IDS, **GREEDY), rounded(tiny_opt()).generate(IDS, **GREEDY))


def test_an_export_that_was_not_loaded_says_so(save_opt, tmp_path):
    config = NeuronOPTForCausalLM.get_neuron_config(save_opt(), sequence_length=32)
    model = NeuronOPTForCausalLM.export(save_opt(), config, eager=True)
    with pytest.raises(RuntimeError, match="load_weights=True"):
        model.generate(IDS)
    model.save_pretrained(tmp_path / "out")
    assert NeuronOPTForCausalLM.from_pretrained(tmp_path / "out").generate(IDS, max_new_tokens=3).shape == (1, 6)


def test_defaults_on_a_laptop(save_opt):
    config = NeuronOPTForCausalLM.get_neuron_config(save_opt())
    assert (config.batch_size, config.sequence_length, config.tp_degree, config.instance_type) == (1, 224, 1, "cpu")


def test_saving_keeps_a_changed_generation_config_and_leaves_the_first_export_alone(export, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    before = (export / "generation_config.json").read_bytes()
    model.generation_config.max_new_tokens = 11
    model.save_pretrained(tmp_path / "again")
    assert (export / "generation_config.json").read_bytes() == before
    again = NeuronOPTForCausalLM.from_pretrained(tmp_path / "again", eager=True)
    assert again.generation_config.max_new_tokens == 11
    model.save_pretrained(export)
    assert json.loads((export / "generation_config.json").read_text())["max_new_tokens"] == 11


def test_saving_refuses_a_directory_that_is_no_export(export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not an export"):
        NeuronOPTForCausalLM.from_pretrained(export, eager=True).save_pretrained(tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_saving_takes_what_pipelines_pass(export, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    model.save_pretrained(tmp_path / "again", safe_serialization=True)
    assert NeuronOPTForCausalLM.from_pretrained(tmp_path / "again", eager=True).neuron_config == model.neuron_config
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path / "third", safe_serialization=False)
    with pytest.raises(TypeError, match="push_too_hub.*did you mean 'push_to_hub'"):
        model.save_pretrained(tmp_path / "third", push_too_hub=True)
    assert not (tmp_path / "third").exists()


def test_the_temporary_export_goes_with_the_model(load_opt):
    model = load_opt(tiny_opt(), sequence_length=32)
    directory = model.directory
    assert directory.is_dir()
    del model
    gc.collect()
    assert not directory.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_degre": 2}, "did you mean 'tp_degree'"),
        ({"sequence_lenght": 2}, "did you mean 'sequence_length'"),
        ({"device_map": "auto"}, "known options: .*amp"),
    ],
)
def test_unknown_options_name_the_nearest(options, message, save_opt, export):
    for path in (save_opt(), export):
        with pytest.raises(TypeError, match=message):
            NeuronOPTForCausalLM.from_pretrained(path, **options)
    with pytest.raises(TypeError, match="has no option 'cachedir': did you mean 'cache_dir'"):
        config = NeuronOPTForCausalLM.get_neuron_config(save_opt())
        NeuronOPTForCausalLM.export(save_opt(), config, cachedir="x")


def test_options_of_an_export_cannot_be_changed_on_loading(export):
    with pytest.raises(ValueError, match="batch_size=2, which cannot be changed to 3"):
        NeuronOPTForCausalLM.from_pretrained(export, batch_size=3)
    with pytest.raises(ValueError, match="tp_degree=1, which cannot be changed to 2"):
        NeuronOPTForCausalLM.from_pretrained(export, tp_degree=2)
    with pytest.raises(ValueError, match="disagree"):
        NeuronOPTForCausalLM.from_pretrained(export, tp_degree=2, tensor_parallel_size=1)
    with pytest.raises(ValueError, match="dtype=torch.bfloat16 and torch_dtype='f16' disagree"):
        NeuronOPTForCausalLM.from_pretrained(export, dtype=torch.bfloat16, torch_dtype="f16")
    NeuronOPTForCausalLM.from_pretrained(export, dtype=torch.float16, amp="half", eager=True)
    NeuronOPTForCausalLM.from_pretrained(export, batch_size=2, amp="fp16", tensor_parallel_size=1, eager=True)


def test_export_may_be_asked_for_or_forbidden(export, save_opt):
    again = NeuronOPTForCausalLM.from_pretrained(export, export=True, eager=True, batch_size=3, sequence_length=32)
    assert (again.neuron_config.batch_size, again.neuron_config.sequence_length) == (3, 32)
    assert again.generate(IDS, max_new_tokens=3).shape == (1, 6)
    assert NeuronOPTForCausalLM.from_pretrained(export, export=False, eager=True).neuron_config.batch_size == 2
    source = save_opt()
    made = NeuronOPTForCausalLM.from_pretrained(source, export=True, torch_dtype=torch.bfloat16, eager=True)
    assert made.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is a checkpoint, not an export.*optimum-cli export neuron -m"):
        NeuronOPTForCausalLM.from_pretrained(source, export=False)


def test_harnesses_find_the_length_of_the_export(export):
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    assert model.config.n_positions == 64 and model.config.max_position_embeddings == 224
    assert json.loads((export / "config.json").read_text()).get("n_positions") is None
    assert model.neuron_config.continuous_batching is True


BAD_OPTIONS = {
    "a dtype": ({"torch_dtype": "int4"}, "torch_dtype='int4' is not a dtype.*f16, bf16 or f32"),
    "amp": ({"amp": "int8"}, "amp='int8'.*f16, bf16 or f32"),
    "cache": ({"kv_cache_dtype": "f64"}, "kv_cache_dtype='f64'"),
    "degree": ({"tp_degree": 3}, "tp_degree=3 cannot split 4 attention heads.*1, 2, 4"),
    "length": ({"sequence_length": 225}, "sequence_length=225 exceeds the 224 positions"),
    "batch": ({"batch_size": 0}, "batch_size=0"),
    "instance": ({"instance_type": "p4d"}, "instance_type='p4d' is not one of cpu, trn1"),
    "no cores": (
        {"instance_type": "trn1"},
        "no NeuronCores.*tensor_parallel_size" if INSTALLED else "Python 3.10 and 3.11",
    ),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options(bad, save_opt):
    options, message = BAD_OPTIONS[bad]
    with pytest.raises(ValueError, match=message):
        NeuronOPTForCausalLM.from_pretrained(save_opt(), **options)


def test_a_neuron_instance_without_the_sdk(save_opt):
    with pytest.raises(RuntimeError, match=f"instance_type='inf2'.*{'SDK' if INSTALLED else 'Python 3.1'}"):
        NeuronOPTForCausalLM.from_pretrained(save_opt(), instance_type="inf2", tensor_parallel_size=2)


def test_what_is_no_model(tmp_path):
    with pytest.raises(OSError, match="no config.json"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="config.json is not valid JSON. Correct the file"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path)
    for nothing in (None, "", 7):
        with pytest.raises(TypeError, match="must be a directory or an id on the hub"):
            NeuronOPTForCausalLM.from_pretrained(nothing)
    with pytest.raises(OSError, match="config.json is a file: give the directory that holds the model"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path / "config.json")
    with pytest.raises(OSError, match="no-such-model"):
        NeuronOPTForCausalLM.from_pretrained("no-such-model", local_files_only=True)


def test_without_a_generation_config_it_has_the_defaults_of_the_model(export, caplog):
    (export / "generation_config.json").unlink()
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    assert "has no generation_config.json" in caplog.text
    assert torch.equal(model.generate(IDS, **GREEDY), rounded(tiny_opt()).generate(IDS, **GREEDY))
    (export / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json cannot be read.*correct it, or remove it"):
        NeuronOPTForCausalLM.from_pretrained(export)


def _remove(name):
    return lambda directory: (directory / name).unlink()


def _truncate(name):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-100])


def _edit(name, **changes):
    def edit(directory):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**values, **changes}))

    return edit


DAMAGES = {
    "a layer is missing": (_remove("checkpoint/layer_001.safetensors"), "layer_001.safetensors"),
    "the index is missing": (_remove("checkpoint/model.safetensors.index.json"), "model.safetensors.index.json"),
    "a layer is truncated": (_truncate("checkpoint/layer_000.safetensors"), "layer_000.safetensors is truncated"),
    "config.json is missing": (_remove("config.json"), "no config.json"),
    "the manifest is missing": (_remove("compiled/manifest.json"), "manifest.json is missing"),
    "the options are missing": (_remove("neuron_config.json"), "is an export whose neuron_config.json is missing"),
    "another width": (_edit("config.json", ffn_dim=192), r"fc1.weight is .*\(96, 64\).*\(192, 64\)"),
    "another depth": (_edit("config.json", num_hidden_layers=3), "layer_002.safetensors"),
    "another dtype": (_edit("neuron_config.json", amp="bf16"), "torch.float16.*torch.bfloat16"),
    "another degree": (_edit("neuron_config.json", tp_degree=3), "tp_degree=3 cannot split"),
    "a newer format": (_edit("neuron_config.json", format_version=99), "format 99.*upgrade"),
    "an unknown option": (_edit("neuron_config.json", top_k=1), "has no option 'top_k': did you mean 'max_topk'"),
    "another library's": (_edit("neuron_config.json", _serialized_key="NxDNeuronConfig"), "NxDNeuronConfig"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_named(damage, export):
    harm, message = DAMAGES[damage]
    harm(export)
    with pytest.raises((CheckpointError, ValueError, TypeError, OSError), match=message):
        NeuronOPTForCausalLM.from_pretrained(export)


def test_behaves_as_a_model(export):
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    other = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    assert model == model and model != other and len({model, other}) == 2
    assert model.eval() is model and model.to("cpu") is model and model.can_generate()
    assert model.device == torch.device("cpu") and model.dtype == torch.float16
    assert model.main_input_name == "input_ids" and model.preprocessors == []
    with pytest.raises(ValueError, match="cannot be moved to cuda"):
        model.to("cuda")
    with pytest.raises(TypeError, match="label_ids"):
        model(IDS, label_ids=IDS)


def test_logits_of_a_padded_batch(export):
    model, reference = NeuronOPTForCausalLM.from_pretrained(export, eager=True), rounded(tiny_opt())
    ids, mask = torch.tensor([[1, 9, 8], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    logits = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        assert torch.allclose(logits[0, 1:], reference(ids[:1, 1:]).logits[0], atol=1e-4)
        assert torch.allclose(logits[1], reference(ids[1:]).logits[0], atol=1e-4)
    assert not logits[0, 0].any()
