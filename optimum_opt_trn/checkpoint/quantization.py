"""Weights in int8, and what config.json says of them: the scheme and the names of compressed-tensors.

The matrices of attention and MLP are quantized, each output channel with a scale of its own: `weight` is int8
`(out, in)`, `weight_scale` float32 `(out, 1)`, and the matrix is their product. Quantization is symmetric, to the
nearest. All else keeps its dtype, the embedding and the head too: the format leaves them out.

The format is `int-quantized` (https://github.com/vllm-project/compressed-tensors), which transformers and vLLM load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


METHOD, FORMAT = "compressed-tensors", "int-quantized"
SCALE = "_scale"

# Linear layers that are not quantized: the head, and 350M's projections.
_IGNORED = ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]
_LARGEST = 127


def quantization_config() -> dict[str, Any]:
    """What config.json says of a checkpoint whose matrices are int8."""
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
        "ignore": _IGNORED,
    }


def is_int8(config: Any) -> bool:
    """Whether the weights of a model with this (checked) configuration are int8."""
    return getattr(config, "quantization_config", None) is not None


def check_quantization(quantization: Any, source: Any) -> None:
    """Checks the `quantization_config` of a config.json.

    Raises:
        ValueError: if it is not one of weights in int8 with a scale for each output channel; the message names what
            it is, and what would do.
    """
    try:
        problem = _problem(quantization)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"one that cannot be read ({type(error).__name__}: {error})"
    if problem:
        raise ValueError(
            f"{source}: its config.json has a quantization_config, {problem}. Choose the model that it was quantized "
            f"from, or one in {METHOD}' format {FORMAT} with int8 weights, symmetric, with a scale for each output "
            "channel."
        )


def _problem(quantization: Mapping[str, Any]) -> str | None:
    method = quantization["quant_method"]
    if method != METHOD:
        return f"of {method!r}"
    given = quantization.get("format")
    if given != FORMAT:
        return f"in format {given!r}"
    if quantization.get("kv_cache_scheme"):
        return "with a quantized cache"
    if (
        quantization.get("transform_config")
        or (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense"
    ):
        return "of transformed or sparse weights"
    groups = quantization["config_groups"].values()
    for group in groups:
        weights = group["weights"]
        kind = f"{weights['type']}{weights['num_bits']}"
        if kind != "int8" or not weights["symmetric"] or weights["strategy"] != "channel":
            symmetric = "symmetric" if weights["symmetric"] else "asymmetric"
            return f"with weights in {kind}, {symmetric}, by {weights['strategy']}"
        if group.get("input_activations") or group.get("output_activations"):
            return "with quantized activations"
    return None if groups else "without config_groups"


def scales(rows: Tensor) -> Tensor:
    """The scales of some rows of a matrix, floating point `(n, in)` → float32 `(n, 1)`.

    The largest magnitude of a row becomes 127. A row of zeros has scale 1.
    """
    largest = rows.float().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / _LARGEST, torch.ones(()))


def quantize(rows: Tensor) -> Tensor:
    """Some rows of a matrix, floating point `(n, in)` → int8, to be multiplied with `scales(rows)`."""
    return (rows.float() / scales(rows)).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
