"""AWS Trainium and Inferentia2: compiled by neuronx-distributed and neuronx-cc, one NeuronCore a rank."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OPTConfig

from ...checkpoint import load_weights
from ...checkpoint.layout import CHECKPOINT_DIR
from ...configuration_opt import OPTNeuronConfig
from ...model.arithmetic import Arithmetic
from ...model.parallel import RankGroup
from ..base import COMPILED_DIR, Runtime, Target, TargetError
from ..eager import EagerRuntime
from .artifacts import MODEL_NAME, check_artifacts, write_manifest
from .builder import compile_model, compiler_arguments, load_model, versions
from .host import check_degree, check_host
from .process import claim_process
from .rank_module import example_inputs, parameters_of
from .runtime import NeuronRuntime


class NeuronTarget(Target):
    """Needs the Neuron SDK; compiling needs no device.

    Args:
        trust_remote_code: loads compiled models that were not made here, too (see `trust`).
    """

    def __init__(self, trust_remote_code: bool = False):
        self.trust_remote_code = trust_remote_code

    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        """See `Target`.

        Raises:
            TargetError: if the instance family does not connect `tp_degree` cores, or the compiler refuses a graph.
        """
        check_degree(neuron_config)
        compiled = directory / COMPILED_DIR
        compiled.mkdir(parents=True, exist_ok=True)
        if not eager:
            one = RankGroup(neuron_config.tp_degree, (0,))
            weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, one)
            shapes = {
                name: (tensor.shape, tensor.dtype)
                for part in parameters_of(weights, ranks=1)
                for name, tensor in part[0].items()
            }
            compile_model(config, neuron_config, shapes, compiled / MODEL_NAME)
        arguments = {graph: compiler_arguments(neuron_config, graph) for graph in example_inputs(neuron_config)}
        write_manifest(config, neuron_config, versions(), arguments, compiled)

    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        """See `Target`; with `eager`, runs the same program on the host's CPU, in the dtypes of the device.

        Raises:
            TargetError: if this host has not what the export was compiled for: a device of the family, enough cores
                that no other process holds, the compiler's version.
            ValueError: if it was compiled elsewhere, without `trust_remote_code`.
        """
        degree = neuron_config.tp_degree
        group = RankGroup(degree, tuple(range(degree)), Arithmetic(neuron_config.amp_dtype))
        if not eager:
            file = check_artifacts(config, neuron_config, versions(), directory / COMPILED_DIR, self.trust_remote_code)
            check_host(neuron_config)
            claim_process(degree)
        weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, group)
        if eager:
            return EagerRuntime(config, neuron_config, group, weights)
        try:
            return NeuronRuntime(neuron_config, load_model(file, parameters_of(weights, degree), degree))
        except (RuntimeError, torch.jit.Error) as error:
            cause = str(error).splitlines()[-1]  # TorchScript puts its own trace before it
            raise TargetError(
                f"The export could not be loaded onto {degree} NeuronCores ({cause}). If another process holds them "
                "(neuron-ls says which), end it, or choose others by NEURON_RT_VISIBLE_CORES."
            ) from error
