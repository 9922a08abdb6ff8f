"""What is taken from optimum-neuron, and what works without it."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch
from requirements import needs_optimum_neuron
from small_models import tiny_opt

from optimum_opt_trn import host_framework


# A process in which optimum-neuron cannot be found.
WITHOUT = """
import importlib.util, json, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "optimum.neuron" else found(name, *package)
"""


def without_optimum_neuron(code: str, *arguments: object) -> str:
    """What `code` prints last, in such a process."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_one_side_or_the_other():
    from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig

    origin = "optimum.neuron" if host_framework.INSTALLED else "optimum_opt_trn.without_optimum_neuron"
    for base in (host_framework.NeuronModelForCausalLM, host_framework.NeuronConfig):
        assert base.__module__.startswith(origin)
    assert issubclass(NeuronOPTForCausalLM, host_framework.NeuronModelForCausalLM)
    assert issubclass(OPTNeuronConfig, host_framework.NeuronConfig)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = host_framework.no_such_name


EXPORT_AND_LOAD = """
import torch
from optimum.modeling_base import OptimizedModel
from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, host_framework
assert not host_framework.INSTALLED
source, directory, written = sys.argv[1:]
model = NeuronOPTForCausalLM.export(
    source, OPTNeuronConfig(sequence_length=64, tp_degree=2), load_weights=True, eager=True
)
assert isinstance(model, OptimizedModel) and model.device == torch.device("cpu")
assert model.to("cpu") is model
try:
    model.to("meta")
except ValueError as error:
    assert "meta" in str(error)
else:
    raise AssertionError("it was moved")
model.save_pretrained(written)
prompt = torch.tensor([[2, 17, 90, 5, 33]])
loaded = NeuronOPTForCausalLM.from_pretrained(directory, eager=True)
assert not any(name.startswith("optimum.neuron") for name in sys.modules)
print(json.dumps([m.generate(prompt, max_new_tokens=9).tolist() for m in (model, loaded)]))
"""


def test_exports_load_on_both_sides(tmp_path):
    from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig

    source = tmp_path / "source"
    tiny_opt().save_pretrained(source)
    config = OPTNeuronConfig(sequence_length=64, tp_degree=2)
    ours = NeuronOPTForCausalLM.export(source, config, load_weights=True, eager=True)
    ours.save_pretrained(tmp_path / "here")
    tokens = ours.generate(torch.tensor([[2, 17, 90, 5, 33]]), max_new_tokens=9).tolist()
    there = without_optimum_neuron(EXPORT_AND_LOAD, source, tmp_path / "here", tmp_path / "there")
    assert json.loads(there) == [tokens, tokens]
    back = NeuronOPTForCausalLM.from_pretrained(tmp_path / "there", eager=True)
    assert back.neuron_config == config
    assert back.generate(torch.tensor([[2, 17, 90, 5, 33]]), max_new_tokens=9).tolist() == tokens


def test_neuron_without_optimum_neuron_says_what_it_needs():
    code = """
from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.targets import get_target
from transformers import OPTConfig
errors = []
for call in (
    lambda: get_target(OPTNeuronConfig(instance_type="inf2")),
    lambda: NeuronOPTForCausalLM.get_neuron_config("nowhere", config=OPTConfig(), instance_type="trn1"),
):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
    errors = json.loads(without_optimum_neuron(code))
    assert len(errors) == 2
    for error, instance_type in zip(errors, ("inf2", "trn1"), strict=True):
        assert f"instance_type={instance_type!r} needs optimum-neuron 0.4.5" in error
        assert "Python 3.10 and 3.11" in error and "instance_type='cpu'" in error


@needs_optimum_neuron
def test_an_optimum_neuron_that_does_not_fit_is_one_line(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(host_framework, "version", lambda name: "5.24.0" if name == "transformers" else version(name))
    with pytest.raises(ImportError) as error:
        host_framework.check_versions()
    message = str(error.value)
    assert "\n" not in message
    assert f"optimum-neuron {version('optimum-neuron')} needs transformers~=4.57.1, and 5.24.0 is installed" in message
    assert "pip uninstall optimum-neuron" in message
