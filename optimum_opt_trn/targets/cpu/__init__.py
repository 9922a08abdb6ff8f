"""The embedded default: ahead-of-time compiled for the host's CPU, all ranks in one process."""

from __future__ import annotations

from pathlib import Path

from transformers import OPTConfig

from ...checkpoint import load_weights
from ...configuration_opt import OPTNeuronConfig
from ...parallel import RankGroup
from ..base import CHECKPOINT_DIR, COMPILED_DIR, Runtime, Target
from .artifacts import compile_stages, load_stages
from .runtime import CPURuntime
from .stages import eager_stages, export_stages


class CPUTarget(Target):
    """Holds every rank of the world in this process, in lockstep."""

    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        group = _group(neuron_config)
        weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, group)
        exports = {} if eager else export_stages(config, neuron_config, group, weights)
        compile_stages(config, neuron_config, exports, directory / COMPILED_DIR)

    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        group = _group(neuron_config)
        weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, group)
        stages = None if eager else load_stages(config, neuron_config, directory / COMPILED_DIR)
        if stages is None:
            stages = eager_stages(config, neuron_config, group)
        return CPURuntime(config, neuron_config, group, weights, stages)


def _group(neuron_config: OPTNeuronConfig) -> RankGroup:
    degree = neuron_config.tp_degree
    return RankGroup(world_size=degree, ranks=tuple(range(degree)))
