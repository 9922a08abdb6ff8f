"""Whether this host can run an export that was compiled for Neuron."""

from __future__ import annotations

import os

from optimum.neuron.utils.instance import current_instance_type
from optimum.neuron.utils.system import get_available_cores, get_neuron_major

from ...configuration_opt import OPTNeuronConfig
from ...hardware import FAMILIES
from ..base import TargetError


# They say which cores a process gets (awsdocs-neuron, "Neuron Runtime configuration").
CORE_VARIABLES = ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES")


def check_degree(neuron_config: OPTNeuronConfig) -> None:
    """Raises TargetError if the instance family does not connect `tp_degree` cores."""
    degrees = FAMILIES[neuron_config.instance_type].tp_degrees
    if neuron_config.tp_degree not in degrees:
        raise TargetError(
            f"tp_degree={neuron_config.tp_degree}: {neuron_config.instance_type} connects "
            f"{', '.join(map(str, degrees))} NeuronCores; choose one of these."
        )


def check_host(neuron_config: OPTNeuronConfig) -> None:
    """Checks that this host has what an export was compiled for.

    Raises:
        TargetError: if it has no Neuron device, one of another family, or too few cores for this process.
    """
    degree = neuron_config.tp_degree
    wanted = f"This export was compiled for {neuron_config.instance_type} with tp_degree={degree}"
    elsewhere = "load it on such an instance, or with eager=True, which runs it slowly on the host's CPU"
    if get_neuron_major() == -1:
        raise TargetError(f"{wanted}, and this host has no Neuron device: {elsewhere}.")
    family = current_instance_type()
    if family != neuron_config.target:
        raise TargetError(f"{wanted}, and this is a {family}: {elsewhere}, or export the model again here.")
    cores = get_available_cores()
    if cores < degree:
        given = ", ".join(f"{name}={os.environ[name]}" for name in CORE_VARIABLES if name in os.environ)
        raise TargetError(
            f"{wanted}, and this process has {cores} NeuronCores{f' ({given})' if given else ''}: give it {degree}, "
            f"for example NEURON_RT_VISIBLE_CORES=0-{degree - 1}, or export the model again with tp_degree={cores} or "
            "fewer."
        )
