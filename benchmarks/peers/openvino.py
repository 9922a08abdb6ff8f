"""OpenVINO through optimum-intel, stateful as it exports by default.

`weights` is what they are stored in, `hint` the precision of inference that OpenVINO is asked for; all else is its
default for latency.
"""

from __future__ import annotations

import importlib.metadata

import openvino
import transformers
from optimum.intel import OVModelForCausalLM

from .forward import ForwardRunner


class Peer(ForwardRunner):
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
