"""ONNX Runtime through optimum-onnx."""

from __future__ import annotations

import importlib.metadata

import onnxruntime
import transformers
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM

from .forward import ForwardRunner


class Peer(ForwardRunner):
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
