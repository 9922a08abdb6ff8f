"""Which inputs of fc2 are 0 in a checkpoint of random weights, and how to plant as many as trained models have.

In trained OPTs most of fc2's inputs are 0 after the ReLU; with random weights it is half of them. A shift of fc1's
bias gives any share: for each layer it is the quantile of what fc1 computes for some random tokens. Other random
tokens then tell which share the layer really has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTForCausalLM


FILE = "fc2_zeros.json"
BATCHES = (1, 2, 4, 8)
SEED, SEQUENCES, TOKENS = 20261126, 8, 48


@dataclass(frozen=True)
class Zeros:
    """Shares of fc2's inputs.

    Args:
        zero: of each layer, the share that is 0.
        idle: batch size -> the share that is 0 in every row, over all layers: their weights need not be read.
    """

    zero: list[float]
    idle: dict[int, float]

    def describe(self) -> str:
        low, high = min(self.zero), max(self.zero)
        idle = ", ".join(f"{share:.0%} at batch {batch}" for batch, share in self.idle.items())
        return f"{sum(self.zero) / len(self.zero):.1%} ({low:.1%} to {high:.1%} by layer); in every row {idle}"


def measure(checkpoint: Path) -> Zeros:
    """The shares in `checkpoint`; kept in a file there."""
    file = checkpoint / FILE
    if not file.is_file():
        _write(file, _run(checkpoint, None)[0])
    content = json.loads(file.read_text())
    return Zeros(content["zero"], {int(batch): share for batch, share in content["idle"].items()})


def plant(checkpoint: Path, share: float, directory: Path) -> Path:
    """Writes `checkpoint` with biases of fc1 such that `share` of fc2's inputs are 0; `directory`, if it is there too.

    Raises:
        ValueError: if `share` is not in [0.5, 1), or a layer came out further than 0.02 from it.
    """
    if not 0.5 <= share < 1:
        raise ValueError(f"A share of {share} zeros cannot be planted: choose one from 0.5 to below 1.")
    if (directory / "config.json").is_file():
        return directory
    zeros, shifts = _run(checkpoint, share)
    if any(abs(found - share) > 0.02 for found in zeros.zero):
        raise ValueError(f"{share:.0%} of zeros were wanted, and {zeros.describe()} came out.")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(FILE))
    for file in sorted(partial.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if found := re.search(r"layers\.(\d+)\.fc1\.bias$", name):
                tensors[name] = (tensor.float() - shifts[int(found[1])]).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    _write(partial / FILE, zeros)
    os.rename(partial, directory)
    return directory


def _write(file: Path, zeros: Zeros) -> None:
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(vars(zeros)))
    os.replace(partial, file)


@torch.inference_mode()
def _run(checkpoint: Path, share: float | None) -> tuple[Zeros, list[float]]:
    """What random tokens show, and each layer's shift. Half of the sequences say how far, the others the shares."""
    model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    shifts: list[float] = []
    zero: list[float] = []
    idle: dict[int, list[float]] = {batch: [] for batch in BATCHES}

    def watch(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = output.reshape(SEQUENCES, TOKENS, -1)  # OPT's MLP may see (tokens, units)
        shift = 0.0 if share is None else _quantile(rows[: SEQUENCES // 2], share)
        shifts.append(shift)
        inactive = rows[SEQUENCES // 2 :] <= shift
        zero.append(inactive.float().mean().item())
        # Rows of a batch are other sequences, at any position.
        pool = inactive.reshape(-1, inactive.shape[-1])
        generator = torch.Generator().manual_seed(SEED)
        for batch, found in idle.items():
            drawn = torch.randint(len(pool), (64, batch), generator=generator)
            found.append(pool[drawn].all(dim=1).float().mean().item())
        return output - shift

    handles = [layer.fc1.register_forward_hook(watch) for layer in model.model.decoder.layers]
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(4, model.config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    model.model.decoder(ids)
    for handle in handles:
        handle.remove()
    means = {batch: sum(found) / len(found) for batch, found in idle.items()}
    return Zeros(zero, means), shifts


def _quantile(values: Tensor, share: float) -> float:
    """torch.quantile takes at most 16 million values."""
    return values.flatten().kthvalue(max(1, round(share * values.numel()))).values.item()


def fc2_bytes(header: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """Bytes of fc2's weights among those of a checkpoint (`read_headers`)."""
    return sum(size for name, (_, size) in header.items() if name.endswith("fc2.weight"))
