"""OpenVINO through optimum-intel, stateful as it exports by default.

Steps are calls of the model's forward and an argmax. `weights` is what they are stored in, `hint` the precision of
inference that OpenVINO is asked for; all else is its default for latency.
"""

from __future__ import annotations

import importlib.metadata

import openvino
import torch
import transformers
from optimum.intel import OVModelForCausalLM

from .base import Runner


class Peer(Runner):
    def versions(self) -> dict[str, str]:
        return {
            "openvino": openvino.__version__,
            "optimum-intel": importlib.metadata.version("optimum-intel"),
            "transformers": transformers.__version__,
        }

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        kind = {"load_in_8bit": self.options["weights"] == "int8"}
        OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **kind).save_pretrained(directory)

    def load(self, directory: str) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.options["hint"],
            "INFERENCE_NUM_THREADS": str(self.threads),
        }
        self.model = OVModelForCausalLM.from_pretrained(directory, ov_config=settings)

    def prefill(self, prompts: list[list[int]], room: int) -> list[int]:
        self.past = None
        self.mask = torch.ones(len(prompts), 0, dtype=torch.long)
        return self._run(torch.tensor(prompts))[:, 0].tolist()

    def decode(self, steps: int) -> list[list[int]]:
        return torch.cat([self._run(self.next) for _ in range(steps)], dim=1).tolist()

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        result = self.model(input_ids=ids, attention_mask=self.mask, past_key_values=self.past)
        self.past = result.past_key_values
        self.next = result.logits[:, -1].argmax(-1, keepdim=True)
        return self.next
