"""Steps of a model that is called as transformers' models are: its forward, with a cache, and an argmax."""

from __future__ import annotations

from typing import Any

import torch

from .base import Runner


class ForwardRunner(Runner):
    """`load` sets `model`."""

    model: Any

    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        self.past = None
        self.mask = torch.ones(len(prompts), 0, dtype=torch.long)
        return self._run(torch.tensor(prompts))[:, 0].tolist()

    def decode(self, steps: int) -> list[list[int]]:
        return torch.cat([self._run(self.next) for _ in range(steps)], dim=1).tolist()

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        result = self.model(input_ids=ids, attention_mask=self.mask, past_key_values=self.past, use_cache=True)
        self.past = result.past_key_values
        self.next = result.logits[:, -1].argmax(-1, keepdim=True)
        return self.next
