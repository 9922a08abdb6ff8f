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


def _ours(name: str, amp: str, compute: str, **options: Any) -> Contender:
    precision = "medium" if compute == "bf16" else "highest"
    return _contender(name, "serving_ours", amp, compute, amp=amp, eager=False, precision=precision, **options)


# By how they and the peers beside them multiply.
OURS = {"f32": _ours("ours-f16", "f16", "f32"), "bf16": _ours("ours-bf16", "bf16", "bf16")}
STATIC = _ours("ours-f16-static", "f16", "f32", static=True)
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
