"""ONNX Runtime through optimum-onnx. Steps are calls of the model's forward and an argmax."""

from __future__ import annotations

import importlib.metadata

import onnxruntime
import torch
import transformers
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM

from .base import Runner


class Peer(Runner):
    def versions(self) -> dict[str, str]:
        return {
            "onnxruntime": onnxruntime.__version__,
            "optimum-onnx": importlib.metadata.version("optimum-onnx"),
            "transformers": transformers.__version__,
        }

    def convert(self, source: str, directory: str, batch_size: int, length: int) -> None:
        dtype = {"f16": "fp16", "f32": "fp32"}[self.options["dtype"]]
        main_export(source, directory, task="text-generation-with-past", dtype=dtype, do_validation=False)

    def load(self, directory: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.model = ORTModelForCausalLM.from_pretrained(directory, session_options=options)

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
