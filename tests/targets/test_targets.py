"""Which target an export has."""

import importlib.util

import pytest

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.host_framework import INSTALLED
from optimum_opt_trn.targets import Runtime, Target, get_target
from optimum_opt_trn.targets.cpu import CPUTarget


def test_cpu():
    target = get_target(OPTNeuronConfig())
    assert isinstance(target, CPUTarget) and isinstance(target, Target)


@pytest.mark.skipif(importlib.util.find_spec("torch_neuronx") is not None, reason="the Neuron SDK is installed")
@pytest.mark.parametrize("instance_type", ["trn1", "trn1n", "inf2", "trn2"])
def test_neuron_without_the_sdk_says_what_is_missing_and_the_way_out(instance_type):
    with pytest.raises(RuntimeError) as error:
        get_target(OPTNeuronConfig(instance_type=instance_type))
    message = str(error.value)
    assert f"instance_type={instance_type!r}" in message
    assert ("torch-neuronx) is not installed" if INSTALLED else "Python 3.10 and 3.11") in message
    assert "use instance_type='cpu'" in message


def test_a_target_does_everything():
    """Half a target cannot be made."""
    for base, methods in ((Target, {"compile", "load"}), (Runtime, {"step", "copy"})):
        assert methods <= base.__abstractmethods__
        with pytest.raises(TypeError, match="abstract"):
            base()
