"""Who answers requests: ours in two ways, and every peer in its settings."""

from __future__ import annotations

from typing import Any

from peers import Contender


# The folder of what a peer with a converter makes.
_CONVERSIONS = {
    "serving_ours": "serving-ours",
    "serving_openvino": "serving-openvino",
    "serving_ctranslate2": "ctranslate2",
}


def _contender(name: str, module: str, weights: str, compute: str, **options: Any) -> Contender:
    conversion = f"{_CONVERSIONS[module]}-{weights}" if module in _CONVERSIONS else None
    environment = None if module == "serving_ours" else module.removeprefix("serving_")
    return Contender(name, module, weights, compute, environment, conversion, options)


OURS = _contender("ours-f16", "serving_ours", "f16", "f32", amp="f16", eager=False)
STATIC = _contender("ours-f16-static", "serving_ours", "f16", "f32", amp="f16", eager=False, static=True)
PEERS = {
    contender.name: contender
    for contender in (
        STATIC,
        _contender("transformers-f32", "serving_transformers", "f32", "f32", dtype="f32"),
        _contender("transformers-bf16", "serving_transformers", "bf16", "bf16", dtype="bf16"),
        _contender("openvino-f32", "serving_openvino", "f16", "f32", kind="f16", hint="f32"),
        _contender("openvino-bf16", "serving_openvino", "f16", "bf16", kind="f16", hint="bf16"),
        _contender("ctranslate2-f32", "serving_ctranslate2", "f32", "f32", type="float32"),
        _contender("ctranslate2-int8", "serving_ctranslate2", "int8", "int8", type="int8"),
        _contender("vllm-f32", "serving_vllm", "f32", "f32", dtype="f32"),
        _contender("vllm-bf16", "serving_vllm", "bf16", "bf16", dtype="bf16"),
    )
}
