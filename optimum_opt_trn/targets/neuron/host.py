"""Whether this host can run an export that was compiled for Neuron."""

from __future__ import annotations

import os
import re

from optimum.neuron.utils.instance import current_instance_type
from optimum.neuron.utils.system import cores_per_device, get_neuron_devices_count, get_neuron_major

from ...configuration_opt import OPTNeuronConfig
from ...hardware import FAMILIES
from ..base import TargetError


# They say which cores a process gets (awsdocs-neuron, "Neuron Runtime configuration"): cores and ranges, such as 0,1
# or 3-5,6; or how many. With both set, the runtime takes the first.
CORE_VARIABLES = VISIBLE_CORES, NUM_CORES = ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES")


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
    cores = available_cores()
    if cores < degree:
        given = ", ".join(f"{name}={os.environ[name]}" for name in CORE_VARIABLES if name in os.environ)
        raise TargetError(
            f"{wanted}, and this process has {cores} NeuronCores{f' ({given})' if given else ''}: give it {degree}, "
            f"for example NEURON_RT_VISIBLE_CORES=0-{degree - 1}, or export the model again with tp_degree={cores} or "
            "fewer."
        )


def available_cores() -> int:
    """How many NeuronCores this process gets. optimum-neuron's `get_available_cores` reads no lists.

    Raises:
        TargetError: if a variable cannot be read, or names a core that this host does not have.
    """
    there = get_neuron_devices_count() * cores_per_device()
    visible, number = os.environ.get(VISIBLE_CORES), os.environ.get(NUM_CORES)
    if visible:
        cores = _parse_cores(visible)
        if max(cores) >= there:
            raise TargetError(f"{VISIBLE_CORES}={visible}: this host has the NeuronCores 0 to {there - 1}.")
        return len(cores)
    if not number:
        return there
    if not number.strip().isdecimal():
        raise TargetError(f"{NUM_CORES}={number}: it takes a number of cores, such as 2.")
    return min(int(number), there)


def _parse_cores(text: str) -> set[int]:
    cores: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise TargetError(f"{VISIBLE_CORES}={text}: it takes cores and ranges of cores, such as 0,1 or 3-5,6.")
        cores.update(range(first, last + 1))
    return cores
