"""optimum-neuron's auto class and registries after `import optimum_opt_trn`, on a host without the Neuron SDK."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from requirements import needs_optimum_neuron
from small_models import SHIPPED_MODEL, rounded, tiny_opt
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, pipeline


pytestmark = needs_optimum_neuron

SUPPORT = Path(__file__).parents[1] / "support"
OURS_FIRST = "import optimum_opt_trn\nfrom optimum.neuron import NeuronModelForCausalLM\n"
OURS_LAST = "from optimum.neuron import NeuronModelForCausalLM\nimport optimum_opt_trn\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_opt().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "out"
    config = OPTNeuronConfig(sequence_length=64, kv_cache_dtype="f32")
    NeuronOPTForCausalLM.export(checkpoint, config, eager=True).save_pretrained(directory)
    return directory


def fresh(code: str, *arguments, path: Path | None = None):
    """The last line that `code` prints in a new process, read as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **({"PYTHONPATH": str(path)} if path else {})},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("imports", [OURS_FIRST, OURS_LAST], ids=["ours first", "ours last"])
def test_the_auto_class_resolves_to_ours(imports, checkpoint, export):
    code = f"""{imports}
config = NeuronModelForCausalLM.get_neuron_config(sys.argv[1], sequence_length=48, amp="bf16")
exported = NeuronModelForCausalLM.export(sys.argv[1], config, load_weights=True, eager=True)
loaded = NeuronModelForCausalLM.from_pretrained(sys.argv[2])
import torch
prompt = torch.tensor([[2, 17, 90, 5, 33]])
from optimum.neuron.configuration_utils import _NEURON_CONFIG_FOR_KEY
print(json.dumps({{
    "classes": [type(exported).__name__, type(loaded).__name__, _NEURON_CONFIG_FOR_KEY["OPTNeuronConfig"].__name__],
    "config": [config.target, config.tp_degree, config.sequence_length, config.amp],
    "tokens": loaded.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist(),
}}))"""
    result = fresh(code, checkpoint, export)
    assert result["classes"] == ["NeuronOPTForCausalLM", "NeuronOPTForCausalLM", "OPTNeuronConfig"]
    assert result["config"] == ["cpu", 1, 48, "bf16"]
    reference = rounded(tiny_opt()).generate(
        torch.tensor([[2, 17, 90, 5, 33]]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert result["tokens"] == reference.tolist()


def test_an_unknown_option_is_an_error_through_the_auto_class(export):
    from optimum.neuron import NeuronModelForCausalLM

    with pytest.raises(TypeError, match="did you mean 'tp_degree'"):
        NeuronModelForCausalLM.from_pretrained(export, tp_degre=2)
    with pytest.raises(TypeError, match="amq"):
        NeuronModelForCausalLM.get_neuron_config(export, amq="bf16")


def test_a_config_without_dtype(checkpoint, tmp_path):
    """optimum-neuron's own get_neuron_config raises an error for it."""
    from optimum.neuron import NeuronModelForCausalLM

    config = OPTConfig.from_pretrained(checkpoint)
    config.dtype = None
    assert NeuronModelForCausalLM.get_neuron_config(checkpoint, config=config).amp == "f16"


def test_other_models_are_optimum_neurons_business():
    """The same answer with and without this package: here, that the SDK is missing."""
    code = """
from optimum.neuron import NeuronModelForCausalLM
from optimum.neuron.models import auto_model
from transformers import LlamaConfig
answers = []
for ask in (
    lambda: auto_model.has_neuron_model_class("llama", "text-generation", "inference"),
    lambda: auto_model.get_neuron_model_class("opt", "text-generation", "training"),
    lambda: NeuronModelForCausalLM.get_neuron_config("here", LlamaConfig(dtype="float16"), instance_type="cpu"),
):
    try:
        answers.append(repr(ask()))
    except Exception as error:
        answers.append(repr(error))
print(json.dumps(answers))"""
    code = code.replace('"here"', repr(str(SHIPPED_MODEL)))
    assert fresh(f"import optimum_opt_trn\n{code}") == fresh(code)


def test_with_the_sdk_optimum_neurons_pipeline_takes_an_export(tmp_path):
    """It reads the configuration by the generic `NeuronConfig.from_pretrained`, the model by the auto class."""
    code = """
import fake_sdk
fake_sdk.PACKAGES.add("sentence_transformers")  # which optimum.neuron.pipeline imports, for another task
from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
config = OPTNeuronConfig(batch_size=2, sequence_length=32)
NeuronOPTForCausalLM.export(sys.argv[1], config, eager=True).save_pretrained(sys.argv[2])
from optimum.neuron.configuration_utils import NeuronConfig
from optimum.neuron.pipelines.transformers.base import pipeline
pipe = pipeline("text-generation", sys.argv[2])
results = pipe(["It was", "Mr."], max_new_tokens=4, do_sample=False)
print(json.dumps([NeuronConfig.from_pretrained(sys.argv[2]) == config, type(pipe.model).__name__, results]))"""
    same, name, results = fresh(code, SHIPPED_MODEL, tmp_path / "out", path=SUPPORT)
    assert (same, name) == (True, "NeuronOPTForCausalLM")
    ours = pipeline("text-generation", SHIPPED_MODEL, export=True, eager=True, batch_size=2, sequence_length=32)
    assert results == ours(["It was", "Mr."], max_new_tokens=4, do_sample=False)


def test_with_the_sdk_the_generic_loader_takes_what_was_exported_without(export):
    """It says that there was no compiler; optimum-neuron still refuses that for its own classes."""
    code = """
import fake_sdk, optimum_opt_trn
from optimum.neuron.configuration_utils import NeuronConfig
made = NeuronConfig.from_pretrained(sys.argv[1])
try:
    NeuronConfig.from_dict({**made.to_dict(), "_serialized_key": "Other", "neuronxcc_version": None})
except RuntimeError as error:
    print(json.dumps([type(made).__name__, made.sequence_length, str(error)]))"""
    name, length, error = fresh(code, export, path=SUPPORT)
    assert (name, length) == ("OPTNeuronConfig", 64) and "neuronxcc" in error


def test_transformers_pipeline_takes_our_class_without_complaint(export, caplog):
    model = NeuronOPTForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_transformers_auto_class_is_as_it_was(checkpoint):
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is OPTForCausalLM
