"""transformers: eager with a growing cache, or a compiled step with a static one.

Steps are calls of the model's forward and an argmax, without what `generate` does around them. Prompts run eagerly in
either case, and only their last position goes through the head. `how` is one of

- `eager`;
- `compiled`: `torch.compile` of forward, static shapes, default settings;
- `tuned`: with Inductor's search for the best kernels for constant weights too, which repacks them
  (`max_autotune`, `freezing`): the settings that PyTorch's own pages on inference on CPUs advise.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, OPTForCausalLM, StaticCache

from .base import Runner


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


class Peer(Runner):
    def versions(self) -> dict[str, str]:
        torch.set_num_threads(self.threads)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self, directory: str) -> None:
        self.model = OPTForCausalLM.from_pretrained(directory, dtype=DTYPES[self.options["dtype"]]).eval()
        self.steps: dict[int, object] = {}  # a compiled step for each length of the cache

    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        ids = torch.tensor(prompts)
        if self.options["how"] == "eager":
            self.cache, self.mask, self.step = DynamicCache(), torch.ones_like(ids), self.model
        else:
            self.cache = StaticCache(self.model.config, max_cache_len=room)
            self.mask, self.step = torch.ones(len(ids), room, dtype=torch.long), self._compiled(room)
        self.length = 0
        self.next = self._run(self.model, ids)
        return self.next[:, 0].tolist()

    def decode(self, steps: int) -> list[list[int]]:
        tokens = []
        for _ in range(steps):
            if self.options["how"] == "eager":
                self.mask = torch.cat([self.mask, torch.ones_like(self.next)], dim=1)
            self.next = self._run(self.step, self.next)
            tokens.append(self.next)
        return torch.cat(tokens, dim=1).tolist()

    @torch.inference_mode()
    def _run(self, forward, ids: Tensor) -> Tensor:
        """Next tokens `(rows, 1)` after `ids`, `(rows, n)`."""
        positions = torch.arange(self.length, self.length + ids.shape[1])
        self.length += ids.shape[1]
        logits = forward(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions.expand(len(ids), -1),
            cache_position=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _compiled(self, room: int):
        if room not in self.steps:
            if self.options["how"] == "tuned":
                torch._inductor.config.freezing = True
                torch._inductor.config.max_autotune = True
                torch._inductor.config.max_autotune_gemm_backends = "CPP,ATEN"
            self.steps[room] = torch.compile(self.model.forward, dynamic=False)
        return self.steps[room]
