"""Other ways to build the graphs of the `neuron` target, which validate_on_trn.py sets against the package's own.

A switch replaces a part of the package while a model is exported. The package itself has one way of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from optimum_opt_trn.model.attention import StaticAttention, write_tokens
from optimum_opt_trn.model.parallel import RankGroup
from optimum_opt_trn.model.sampling import Candidates, candidates
from optimum_opt_trn.targets.neuron import builder, rank_module


class WriteFirst(StaticAttention):
    """Writes the new tokens to the cache, and then attends to the cache: each layer's products wait for the write."""

    def __call__(self, rank: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.caches is None:  # a prompt reads no cache
            return super().__call__(rank, query, key, value)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query * self.scale, key, value))
        new = (k.to(self.cache_dtype), v.to(self.cache_dtype))
        written = [write_tokens(cache, x, self.positions) for cache, x in zip(self.caches[rank], new, strict=True)]
        self.new[rank] = (written[0], written[1])
        keys, values = (cache[:, :, : self.window] for cache in written)
        places = torch.arange(keys.shape[2], dtype=torch.int32, device=q.device)
        scores = self._scores(q, keys, places <= self.positions[:, None, :, None])
        return self._matmul(torch.softmax(scores, dim=-1), values).transpose(1, 2).flatten(2)


def whole_vocabulary(module: rank_module.RankModule, part: Tensor, suppressed: Tensor) -> Candidates:
    """The best words of all ranks' logits, which every rank gathers and looks through."""
    if module.world > 1:
        part = module.operators.all_gather(part)[:, : module.program.vocab_size]
    words = torch.arange(part.shape[1], dtype=torch.int32, device=part.device)
    return candidates(part, words, suppressed, module.max_topk, module.operators.top_k)


# For each switch, what is replaced: a module or class, a name in it, and what takes its place.
SWITCHES: dict[str, list[tuple[object, str, object]]] = {
    "attention_after_write": [
        (rank_module, "StaticAttention", WriteFirst),
        (rank_module, "write_tokens", lambda cache, written, places: written),
    ],
    "all_reduce_f32": [(rank_module, "RankGroup", lambda *parts, reduce_dtype=None: RankGroup(*parts))],
    "topk_whole_vocabulary": [(rank_module.RankModule, "_candidates", whole_vocabulary)],
    "context_O2": [(builder, "CONTEXT_ARGUMENTS", builder.DECODING_ARGUMENTS)],
}


@contextmanager
def switched(name: str) -> Iterator[None]:
    """Within it, exports are built in the way `name`, a key of SWITCHES."""
    with ExitStack() as stack:
        for owner, attribute, other in SWITCHES[name]:
            stack.enter_context(patch.object(owner, attribute, other))
        yield
