"""The dtypes of weights and caches, and each name that they have elsewhere: one table. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A dtype and its names.

    Args:
        name: what this package calls it.
        bytes: size of an element.
        torch: its name in `torch`.
        safetensors: its name in the header of a safetensors file.
        cli: its name in the options of optimum-neuron's commands.
        aliases: other names that users write.
    """

    name: str
    bytes: int
    torch: str
    safetensors: str
    cli: str
    aliases: tuple[str, ...] = ()


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("f16", 2, "float16", "F16", "fp16", ("half",)),
        DType("bf16", 2, "bfloat16", "BF16", "bf16"),
        DType("f32", 4, "float32", "F32", "fp32", ("float",)),
        # Of matrices with a scale for each output channel (checkpoint/quantization.py).
        DType("int8", 1, "int8", "I8", "int8"),
    )
}

# The dtypes that a model can be exported in.
AMP_DTYPES = ("f16", "bf16", "f32")

_NAMES = {
    alias: name for name in AMP_DTYPES for alias in (name, DTYPES[name].torch, DTYPES[name].cli, *DTYPES[name].aliases)
}


def normalize_dtype(value: str | torch.dtype, option: str = "amp") -> str:
    """`value` (`"f16"`, `"fp16"`, `"float16"`, `torch.float16`, …) as one of `f16`, `bf16`, `f32`.

    Raises:
        ValueError: for any other value; the message names `option`, the value and the choices.
    """
    name = _NAMES.get(str(value).removeprefix("torch."))
    if name is None:
        hint = " For int8 weights add weight_dtype='int8'." if option == "amp" and "int8" in str(value) else ""
        raise ValueError(f"{option}={value!r} is not a dtype that OPT is exported in: choose f16, bf16 or f32.{hint}")
    return name


def normalize_weight_dtype(value: str | torch.dtype | None, amp: str) -> str | None:
    """`value` as `int8`, or as None for weights in `amp`.

    Raises:
        ValueError: for any other value; the message names the choices.
    """
    if value is None or _NAMES.get(str(value).removeprefix("torch.")) == amp:
        return None
    if str(value).removeprefix("torch.") != "int8":
        raise ValueError(f"weight_dtype={value!r} is neither int8 nor amp={amp!r}: choose int8, or leave it out.")
    return "int8"


def to_torch(name: str) -> torch.dtype:
    """The torch dtype of `name`, a key of DTYPES."""
    import torch  # here, since plans and command lines use the table without torch

    dtype: torch.dtype = getattr(torch, DTYPES[name].torch)
    return dtype
