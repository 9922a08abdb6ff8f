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

from optimum_opt_trn.targets.cpu.int8_copy import int8_copy
from optimum_opt_trn.targets.cpu.kernels import chosen_variant

from .checkpoints import read_headers


FILE = "mlp_zeros.json"
BATCHES = (1, 2, 4, 8)
SEED, SEQUENCES, TOKENS = 20261126, 8, 48
MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Zeros:
    """Shares of fc2's inputs.

    Args:
        zero: of each layer, the share that is 0.
        idle: batch size -> the share that is 0 in every row, over all layers: their weights need not be read.
        left: batch size -> the share that may not be 0 in some row, for all that an int8 copy of fc1 tells.
    """

    zero: list[float]
    idle: dict[int, float]
    left: dict[int, float]

    def describe(self) -> str:
        low, high = min(self.zero), max(self.zero)
        idle = ", ".join(f"{share:.0%} at batch {batch}" for batch, share in self.idle.items())
        left = ", ".join(f"{share:.0%}" for share in self.left.values())
        return (
            f"{sum(self.zero) / len(self.zero):.1%} ({low:.1%} to {high:.1%} by layer); in every row {idle}; "
            f"left by an int8 copy of fc1 {left}"
        )


def measure(checkpoint: Path) -> Zeros:
    """The shares in `checkpoint`; kept in a file there."""
    file = checkpoint / FILE
    if not file.is_file():
        _write(file, _run(checkpoint, None)[0])
    content = json.loads(file.read_text())
    idle, left = ({int(batch): share for batch, share in content[name].items()} for name in ("idle", "left"))
    return Zeros(content["zero"], idle, left)


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
    idle, left = ({batch: [] for batch in BATCHES} for _ in range(2))

    def watch(fc1: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = output.reshape(SEQUENCES, TOKENS, -1)  # OPT's MLP may see (tokens, units)
        shift = 0.0 if share is None else _quantile(rows[: SEQUENCES // 2], share)
        shifts.append(shift)
        inactive = rows[SEQUENCES // 2 :] <= shift
        zero.append(inactive.float().mean().item())
        # Rows of a batch are other sequences, at any position.
        pool = inactive.reshape(-1, inactive.shape[-1])
        lengths = inputs[0].reshape(SEQUENCES, TOKENS, -1)[SEQUENCES // 2 :].norm(dim=-1).reshape(-1, 1)
        above = rows[SEQUENCES // 2 :].reshape(pool.shape) - shift + lengths * int8_copy(fc1.weight).bounds() > 0
        generator = torch.Generator().manual_seed(SEED)
        for batch in BATCHES:
            drawn = torch.randint(len(pool), (64, batch), generator=generator)
            idle[batch].append(pool[drawn].all(dim=1).float().mean().item())
            left[batch].append(above[drawn].any(dim=1).float().mean().item())
        return output - shift

    handles = [layer.fc1.register_forward_hook(watch) for layer in model.model.decoder.layers]
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(4, model.config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    model.model.decoder(ids)
    for handle in handles:
        handle.remove()
    means = ({batch: sum(found) / len(found) for batch, found in shares.items()} for shares in (idle, left))
    return Zeros(zero, *means), shifts


def _quantile(values: Tensor, share: float) -> float:
    """torch.quantile takes at most 16 million values."""
    return values.flatten().kthvalue(max(1, round(share * values.numel()))).values.item()


# Rows that read coded weights at most (csrc/coded.h): with AVX-512, and where bfloat16 exports' factors are rounded.
MOST_CODED, MOST_CODED_ROUNDED = 4, 8
# By unit up to so many skip zeros, if they read such a share of the units at most. Where factors are rounded, more
# rows read all units coded.
MOST_SPARSE, MOST_READ = 8, 0.6


def unread_layer_bytes(export: Path, batch: int, zeros: Zeros) -> float:
    """By how much fewer bytes of the layers our export's steps with so many rows read, of a model with these zeros.

    Few rows read matrices coded, if they are. Of fc2 they read what is not 0 in every row. Of fc1 they read an int8
    copy and what it leaves, if that is less by a tenth (csrc/screened.h).
    """
    header, copies = read_headers(export / "checkpoint"), read_headers(export / "compiled")
    variant, layers = chosen_variant(), len([name for name in header if name.endswith("fc1.weight")])
    plain = {m: sum(size for name, (_, size) in header.items() if name.endswith(f"{m}.weight")) for m in MATRICES}

    def coded(name: str, most: int) -> float | None:
        """Bytes of all layers, if so many rows read them coded."""
        return layers * copies[f"{name}_coded"][1] if f"{name}_coded" in copies and batch <= most else None

    most = {"avx2": 1, "avx512_bf16": MOST_CODED_ROUNDED}.get(variant or "", MOST_CODED)
    named = {m: m if m.startswith("fc") else f"self_attn.{m}" for m in MATRICES}
    read = {matrix: coded(f"{named[matrix]}.weight", most) or size for matrix, size in plain.items()}
    shape, size = copies.get("fc1.weight_int8", ((0, 0), 0))
    screened = layers * size + zeros.left.get(batch, 1.0) * read["fc1"]
    if size and batch <= (2 if shape[1] < 1024 else 4) and screened <= 0.9 * read["fc1"]:
        read["fc1"] = screened
    active = 1 - zeros.idle.get(batch, 0.0)
    if "fc2.weight_by_unit" in copies:
        read["fc2"] *= active
    most = 2 if variant == "avx2" else MOST_CODED
    if by_unit := coded("fc2.weight_by_unit", most if active > MOST_READ else MOST_SPARSE):
        read["fc2"] = by_unit * active
    elif variant == "avx512_bf16":
        read["fc2"] = coded("fc2.weight_by_unit", batch) or read["fc2"]
    return sum(plain.values()) - sum(read.values())
