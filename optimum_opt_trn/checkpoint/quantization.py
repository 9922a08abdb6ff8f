"""Weights in int8, and what config.json says of them: the scheme and the names of compressed-tensors.

The matrices of attention and MLP and the head are quantized, each output channel with a scale of its own: `weight` is
int8 `(out, in)`, `weight_scale` float32 `(out, 1)`, and the matrix is their product. Quantization is symmetric, to the
nearest. All else keeps its dtype. The embedding does, too, so that a head which is tied to it becomes a matrix of its
own; the head of a checkpoint that is quantized already stays what it is (`layout.has_int8_head`).

The format is `int-quantized` (https://github.com/vllm-project/compressed-tensors), which transformers loads. Its
`pack-quantized`, which llm-compressor writes for such weights, is read too: `weight_packed` is int32
`(out, ceil(in / 4))`, each with four values plus 128, the first in the lowest byte; `weight_shape` has `(out, in)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import quantizes_head


METHOD, FORMAT, PACKED_FORMAT = "compressed-tensors", "int-quantized", "pack-quantized"
# What follows the name of a packed matrix.
PACKED, SHAPE = "_packed", "_shape"

# Linear layers that are not quantized: 350M's projections.
_IGNORED = ["model.decoder.project_in", "model.decoder.project_out"]
_LARGEST = 127


def quantization_config(head: bool = True) -> dict[str, Any]:
    """What config.json says of a checkpoint whose matrices are int8, with or without the head."""
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _IGNORED if head else ["lm_head", *_IGNORED],
    }


def is_int8(config: Any) -> bool:
    """Whether the weights of a model with this (checked) configuration are int8."""
    return getattr(config, "quantization_config", None) is not None


def quantization_problem(quantization: Any) -> str | None:
    """What is wrong with the `quantization_config` of a config.json, and what would do; None if nothing is.

    It must be one of weights in int8 with a scale for each output channel.
    """
    try:
        problem = _problem(quantization)
    except (KeyError, TypeError, AttributeError, re.error, OverflowError, RecursionError) as error:
        problem = f"one that cannot be read ({type(error).__name__}: {error})"
    return problem and (
        f"{problem}. Choose the model that it was quantized from, or one in {METHOD}' format {FORMAT} or "
        f"{PACKED_FORMAT} with int8 weights, symmetric, with a scale for each output channel (its strategy 'channel')."
    )


def _problem(quantization: Mapping[str, Any]) -> str | None:
    method = quantization["quant_method"]
    if method != METHOD:
        return f"of {method!r}"
    groups = quantization["config_groups"].values()
    for given in (quantization.get("format"), *(group.get("format") or FORMAT for group in groups)):
        if given not in (FORMAT, PACKED_FORMAT):
            return f"in format {given!r}"
    if quantization.get("kv_cache_scheme"):
        return "with a quantized cache"
    if (
        quantization.get("transform_config")
        or (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense"
    ):
        return "of transformed or sparse weights"
    for group in groups:
        weights = group["weights"]
        kind = f"{weights['type']}{weights['num_bits']}"
        if kind != "int8" or not weights["symmetric"] or weights["strategy"] != "channel":
            symmetric = "symmetric" if weights["symmetric"] else "asymmetric"
            return f"with weights in {kind}, {symmetric}, by {weights['strategy']}"
        if group.get("input_activations") or group.get("output_activations"):
            return "with quantized activations"
    quantizes_head(quantization)  # raises for names that cannot be read
    return None if groups else "without config_groups"


def scales(rows: Tensor) -> Tensor:
    """The scales of some rows of a matrix, floating point `(n, in)` → float32 `(n, 1)`.

    The largest magnitude of a row becomes 127. A row of zeros has scale 1.
    """
    largest = rows.float().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / _LARGEST, torch.ones(()))


def quantize(rows: Tensor) -> Tensor:
    """Some rows of a matrix, floating point `(n, in)` → int8, to be multiplied with `scales(rows)`."""
    return (rows.float() / scales(rows)).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """A packed matrix, int32 `(out, ceil(columns / 4))` → uint8 `(out, columns)`, its values plus 128.

    It is a view, for hosts whose integers begin with the lowest byte. `signed` makes int8 of its rows.
    """
    return packed.contiguous().view(torch.uint8)[:, :columns]


def signed(rows: Tensor) -> Tensor:
    """Some rows of an int8 matrix, as they are stored: int8, or uint8 of `unpack` → int8 `(n, in)`, contiguous."""
    return (rows if rows.dtype == torch.int8 else (rows ^ 128).view(torch.int8)).contiguous()
