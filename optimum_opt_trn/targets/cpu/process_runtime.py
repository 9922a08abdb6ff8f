"""The runtime of a process that holds a share of the ranks, and keeps in step with the others."""

from __future__ import annotations

from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.parallel import RankGroup
from ...model.sampling import Selection
from .processes import Processes
from .runtime import CPURuntime


class ProcessRuntime(CPURuntime):
    """Every process makes the same calls. Each call compares its inputs before the processes wait for one another in
    a sum, so that processes which parted raise an error, all of them.
    """

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

    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        self._check("prefill", input_ids, lengths, selection)
        return super().prefill(input_ids, lengths, selection)

    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        self._check("decode", tokens, positions, selection)
        return super().decode(tokens, positions, selection)

    def extend(self, tokens: Tensor, positions: Tensor, selection: Selection, keep: int) -> tuple[Tensor, Tensor]:
        self._check(f"extend {keep}", tokens, positions, selection)
        return super().extend(tokens, positions, selection, keep)

    def copy(self, sources: Tensor, length: int) -> None:
        self._processes.check_same(f"The copy {length} step", sources)
        super().copy(sources, length)

    def begin(self, *inputs: Tensor) -> None:
        self._processes.check_same("This call", *(part for x in inputs for part in (str(tuple(x.shape)), x)))
        self._processes.share_generator()

    def decide(self, decision: Tensor) -> Tensor:
        return self._processes.decide(decision)

    @property
    def is_first(self) -> bool:
        return self._processes.rank == 0

    def _check(self, graph: str, tokens: Tensor, places: Tensor, selection: Selection) -> None:
        drawn = (selection.params, selection.uniforms, selection.suppressed)
        self._processes.check_same(f"The {graph} step", str(tuple(tokens.shape)), tokens, places, *drawn)
