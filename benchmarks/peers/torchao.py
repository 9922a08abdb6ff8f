"""torchao over transformers: int8 weights, one scale for each output channel, activations as they are.

`quantize_` as torchao's own pages show it, on a model in bfloat16, the dtype for which PyTorch has kernels with int8
weights on CPUs; every linear layer is quantized, the head too. Steps are compiled, for without that each of them
multiplies all matrices out. `how` is that of `peers/transformers.py`: `compiled` multiplies out within the compiled
step, `tuned` finds the kernels that read int8, which Inductor does for constant weights only.
"""

from __future__ import annotations

import importlib.metadata

from torchao.quantization import Int8WeightOnlyConfig, quantize_

from . import transformers


class Peer(transformers.Peer):
    def versions(self) -> dict[str, str]:
        return {**super().versions(), "torchao": importlib.metadata.version("torchao")}

    def load(self, directory: str) -> None:
        super().load(directory)
        quantize_(self.model, Int8WeightOnlyConfig())
