"""Runs the rank program on packed tokens, with the memory-mapped weights and the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OPTConfig

from ...checkpoint import ModelWeights
from ...configuration_opt import OPTNeuronConfig
from ...model.kv_cache import allocate_cache
from ...model.parallel import RankGroup
from ...model.program import OPTRankProgram
from ...model.sampling import Selection, select_tokens
from ..base import Runtime
from .kernels import KernelArithmetic
from .packed_attention import PackedAttention


class CPURuntime(Runtime):
    """All ranks of the group in this process, in lockstep. Padding and idle rows are left out of every product."""

    def __init__(
        self, config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup, weights: ModelWeights
    ) -> None:
        self.neuron_config = neuron_config
        self.program = OPTRankProgram(config, group)
        self.weights = weights
        self.cache = allocate_cache(config, neuron_config, group)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, lengths: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        slots, positions = (torch.arange(input_ids.shape[1]) < lengths[:, None]).nonzero(as_tuple=True)
        rows = lengths.nonzero().squeeze(1)
        hidden = self._layers(input_ids[slots, positions], slots, positions, int(lengths.max()))
        return self._select(hidden[lengths[rows].cumsum(0) - 1], rows, selection)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        rows = (positions >= 0).nonzero().squeeze(1)
        hidden = self._layers(tokens[rows], rows, positions[rows].long(), 1)
        return self._select(hidden, rows, selection)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, positions: Tensor, selection: Selection, keep: int) -> tuple[Tensor, Tensor]:
        rows, k = (positions[:, 0] >= 0).nonzero().squeeze(1), tokens.shape[1]
        hidden = self._layers(tokens[rows].flatten(), rows.repeat_interleave(k), positions[rows].flatten().long(), k)
        kept = hidden.unflatten(0, (-1, k))[:, k - keep :].contiguous()
        return self._select(kept, rows, selection)

    @torch.inference_mode()
    def copy(self, sources: Tensor, length: int) -> None:
        moved = (sources != torch.arange(len(sources))).nonzero().squeeze(1)
        for cache in self.cache:
            for tensor in (*cache.keys, *cache.values):
                tensor[moved, :, :length] = tensor[sources[moved].long(), :, :length]

    def _layers(self, tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        """int32 tokens, int64 slots and positions `(t,)` → float32 `(t, hidden)`, after the last layer."""
        program = self.program
        arithmetic = program.arithmetic
        kernels = isinstance(arithmetic, KernelArithmetic)
        attention = PackedAttention(slots, positions, longest, program.scale, kernels, arithmetic.compute_dtype)
        hidden = program.embed(self.weights.embed, tokens, positions)
        for weights, cache in zip(self.weights.layers, self.cache, strict=True):
            hidden = program.layer(weights, hidden, attention.over(cache))
        return hidden

    def _select(self, hidden: Tensor, rows: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """float32 `(rows, hidden)` or `(rows, n, hidden)` → tokens `(b,)` and logits of that shape, of all slots."""
        logits = self.program.logits(self.weights.head, hidden)
        batch = self.neuron_config.batch_size
        if len(rows) < batch:
            logits = logits.new_zeros(batch, *logits.shape[1:]).index_copy_(0, rows, logits)
        last = logits if logits.dim() == 2 else logits[:, -1]
        # What nobody asked for is not looked at: excluded ids that are none, and more than the best tokens.
        suppressed = selection.suppressed[:, : int((selection.suppressed >= 0).sum(1).max())]
        if bool((selection.params[:, 0] > 1).any()):
            most = self.neuron_config.max_topk
        elif suppressed.shape[1]:
            most = 1
        else:
            return last.argmax(-1).int(), logits  # of tokens that tie the first, as select_tokens has it
        return select_tokens(last, selection.params, selection.uniforms, suppressed, most), logits
