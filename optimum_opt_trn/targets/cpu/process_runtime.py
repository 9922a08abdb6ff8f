"""The runtime of a process that holds a share of the ranks, and keeps in step with the others."""

from __future__ import annotations

from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.parallel import RankGroup
from ..base import Step, StepResult
from .processes import Processes
from .runtime import CPURuntime


class ProcessRuntime(CPURuntime):
    """Every process makes the same calls.

    Each call compares its inputs first. So processes that make different calls raise an error, all of them, and none
    waits in a sum for another that never comes.
    """

    is_shared = True

    def __init__(
        self,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        group: RankGroup,
        weights: ModelWeights,
        processes: Processes,
    ) -> None:
        super().__init__(config, neuron_config, group, weights)
        self._processes = processes

    def step(self, step: Step) -> StepResult:
        """See `Runtime`."""
        sampling = step.sampling
        drawn = (sampling.params, sampling.uniforms, sampling.suppressed)
        given = () if step.embeddings is None else (step.embeddings,)
        packed = (step.tokens, step.slots, step.positions, step.wanted)
        self._processes.check_same("This step", *packed, *drawn, *given, str(step.inner))
        return super().step(step)

    def copy(self, sources: Tensor, length: int) -> None:
        """See `Runtime`."""
        self._processes.check_same(f"Copying {length} positions", sources)
        super().copy(sources, length)

    def begin(self, *inputs: Tensor) -> None:
        self._processes.check_same("This call", *inputs)
        self._processes.share_generator()

    def decide(self, decision: Tensor) -> Tensor:
        return self._processes.decide(decision)

    @property
    def is_first(self) -> bool:
        return self._processes.rank == 0
