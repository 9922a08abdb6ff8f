"""The embedded default: the host's CPU, with all ranks in one process, or in several that share the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import OPTConfig

from ...checkpoint import ModelWeights, load_weights
from ...checkpoint.layout import CHECKPOINT_DIR
from ...configuration_opt import OPTNeuronConfig
from ...model.arithmetic import Arithmetic
from ...model.parallel import RankGroup
from ...planning.host import host_memory
from ..base import Result, Runtime, Target
from .artifacts import Copies, use_artifacts, write_artifacts
from .int8_copy import Int8Copy, Screen
from .kernels import KernelArithmetic, chosen_variant
from .process_runtime import ProcessRuntime
from .processes import all_processes, local_degree
from .runtime import CPURuntime


class CPUTarget(Target):
    """Holds every rank in this process, in lockstep, or a share of them.

    Args:
        tp_processes: how many processes share the model; all of them call `load` and `once`.
    """

    def __init__(self, tp_processes: int = 1):
        self.tp_processes = tp_processes

    def compile(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
        write_artifacts(config, neuron_config, directory, eager)

    def load(self, config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> Runtime:
        """See `Target`.

        Raises:
            TargetError: if the processes cannot share its ranks equally.
            OutOfStepError: if another process fails, or loads another export.
        """
        degree, local = neuron_config.tp_degree, local_degree(neuron_config.tp_degree, self.tp_processes)
        if self.tp_processes == 1:
            group = RankGroup(degree, tuple(range(degree)), _arithmetic(eager))
            return CPURuntime(config, neuron_config, group, *_weights(config, neuron_config, directory, group))
        world = all_processes()
        world.check_same("Loading an export", config.to_json_string(), str(sorted(neuron_config.options().items())))
        ranks = tuple(range(world.rank * local, (world.rank + 1) * local))

        def load() -> ProcessRuntime:
            group = RankGroup(degree, ranks, _arithmetic(eager), world.all_reduce, world.all_gather)
            weights, *_ = _weights(config, neuron_config, directory, group)
            return ProcessRuntime(config, neuron_config, group, weights, world)

        return world.together(load)

    def once(self, neuron_config: OPTNeuronConfig, work: Callable[[], Result]) -> Result:
        """See `Target`. The result is pickled.

        Raises:
            OutOfStepError: if it fails in another process.
        """
        local_degree(neuron_config.tp_degree, self.tp_processes)
        return work() if self.tp_processes == 1 else all_processes().once(work)


def _arithmetic(eager: bool) -> Arithmetic:
    variant = None if eager else chosen_variant()
    return Arithmetic() if variant is None else KernelArithmetic(variant=variant)


def _weights(
    config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, group: RankGroup
) -> tuple[ModelWeights, list[Screen], Int8Copy | None]:
    weights = load_weights(directory / CHECKPOINT_DIR, config, neuron_config, group)
    if not isinstance(group.arithmetic, KernelArithmetic):
        return weights, [], None
    if neuron_config.weight_dtype == "int8":  # the kernels add float32 biases to what they scaled
        for layer in weights.layers:
            layer.update({name: [b.float() for b in layer[name]] for name in layer if name.endswith(".bias")})
    copies = use_artifacts(weights.layers, config, neuron_config, directory, group)
    if not _memory_holds(weights, copies):
        # Of fc2, of which a part is read, there is no other by unit.
        copies = Copies(coded=[(matrix, copy) for matrix, copy in copies.coded if copy.by_unit], head=copies.head)
    for matrix, copy in copies.coded:
        group.arithmetic.coded.add(matrix, copy)
    return weights, copies.screens, copies.head


def _memory_holds(weights: ModelWeights, copies: Copies) -> bool:
    """Whether there is memory for the copies beside the weights, all of which prompts read."""
    try:
        available = host_memory()[1]
    except OSError:  # the system does not tell
        return True
    parts = (weights.embed, weights.head, *weights.layers)
    tensors = [tensor for part in parts for shards in part.values() for tensor in shards]
    tensors += [copy.weight for screen in copies.screens for copy in screen.copies]
    tensors += [copy.rows for _, copy in copies.coded]
    # A tied head is the embedding.
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) <= available
