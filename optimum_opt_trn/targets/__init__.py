"""What compiles and runs graphs."""

from __future__ import annotations

from ..configuration_opt import OPTNeuronConfig
from ..host_framework import INSTALLED, is_neuronx_available
from ..version import NEEDED_FOR_NEURON
from .base import LOGITS_ONLY, Inner, Runtime, Step, StepResult, Target, TargetError


__all__ = ["LOGITS_ONLY", "Inner", "Runtime", "Step", "StepResult", "Target", "TargetError", "get_target"]


def get_target(neuron_config: OPTNeuronConfig, tp_processes: int = 1, trust_remote_code: bool = False) -> Target:
    """The target of an export.

    Args:
        neuron_config: of the export.
        tp_processes: how many processes share the model; only `cpu` has more than 1.
        trust_remote_code: loads compiled models that were not made here, too; exports for `cpu` hold no code.

    Raises:
        TargetError: if this host does not have it; the message says why, and what it has.
    """
    if neuron_config.target == "cpu":
        from .cpu import CPUTarget

        return CPUTarget(tp_processes)
    if tp_processes != 1:
        raise TargetError(
            f"tp_processes={tp_processes}: with instance_type={neuron_config.instance_type!r} one process drives all "
            "NeuronCores of a model; leave it out."
        )
    if not INSTALLED:
        raise TargetError(f"instance_type={neuron_config.instance_type!r} needs {NEEDED_FOR_NEURON}.")
    if not is_neuronx_available():
        raise TargetError(
            f"instance_type={neuron_config.instance_type!r}: the Neuron SDK (torch-neuronx) is not installed here. "
            "Install optimum-opt-trn[neuronx] from https://pip.repos.neuron.amazonaws.com, where no device is needed "
            "to export; or use instance_type='cpu'."
        )
    from .neuron import NeuronTarget

    return NeuronTarget(trust_remote_code)
