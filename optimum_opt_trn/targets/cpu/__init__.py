"""The embedded default: kernels compiled for the host's CPU, all ranks in one process."""

from __future__ import annotations

from pathlib import Path

from transformers import OPTConfig

from ...arithmetic import Arithmetic
from ...checkpoint import load_weights
from ...configuration_opt import OPTNeuronConfig
from ...parallel import RankGroup
from ..base import CHECKPOINT_DIR, COMPILED_DIR, Runtime, Target
from .artifacts import find_kernels, write_artifacts
from .kernels import KernelArithmetic, load_kernels
from .runtime import CPURuntime


class CPUTarget(Target):
    """Holds every rank of the world in this process, in lockstep."""

    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        write_artifacts(directory / COMPILED_DIR, eager)

    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        library = None if eager else find_kernels(directory / COMPILED_DIR)
        if library is not None:
            load_kernels(library)
        arithmetic = Arithmetic() if library is None else KernelArithmetic()
        degree = neuron_config.tp_degree
        group = RankGroup(degree, tuple(range(degree)), arithmetic)
        weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, group)
        return CPURuntime(config, neuron_config, group, weights)
