"""What compiles and runs graphs."""

from __future__ import annotations

from ..configuration_opt import OPTNeuronConfig
from .base import Runtime, Target


__all__ = ["Runtime", "Target", "get_target"]


def get_target(neuron_config: OPTNeuronConfig) -> Target:
    """The target of an export.

    Raises:
        RuntimeError: if it is not to be had on this host; the message says why, and what is.
    """
    if neuron_config.target == "cpu":
        from .cpu import CPUTarget

        return CPUTarget()
    from optimum.neuron.utils.import_utils import is_neuronx_available

    missing = "" if is_neuronx_available() else " the Neuron SDK (torch-neuronx) is not installed here, and"
    raise RuntimeError(
        f"instance_type={neuron_config.instance_type!r}:{missing} this version of optimum_opt_trn does not compile "
        "for Neuron devices yet. Use instance_type='cpu'; its checkpoint/ directory will serve both."
    )
