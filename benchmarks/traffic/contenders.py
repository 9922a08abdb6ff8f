"""Who answers requests: ours in two ways, and every peer in its settings."""

from __future__ import annotations

from typing import Any

from peers import Contender


def _contender(name: str, module: str, weights: str, compute: str, environment: str | None, **options: Any) -> Contender:
    """A contender; ours and those with a converter are given a folder for what it makes."""
    conversions = {"serving_ours": f"serving-ours-{weights}", "serving_openvino": f"serving-openvino-{weights}"}
    conversions["serving_ctranslate2"] = f"ctranslate2-{weights}"
    return Contender(name, module, weights, compute, environment, conversions.get(module), options)


OURS = _contender("ours-f16", "serving_ours", "f16", "f32", None, amp="f16", eager=False)
STATIC = _contender("ours-f16-static", "serving_ours", "f16", "f32", None, amp="f16", eager=False, static=True)
PEERS = {
    contender.name: contender
    for contender in (
        STATIC,
        _contender("transformers-f32", "serving_transformers", "f32", "f32", "transformers", dtype="f32"),
        _contender("transformers-bf16", "serving_transformers", "bf16", "bf16", "transformers", dtype="bf16"),
        _contender("openvino-f16-f32", "serving_openvino", "f16", "f32", "openvino", weights="f16", hint="f32"),
        _contender("openvino-f16-bf16", "serving_openvino", "f16", "bf16", "openvino", weights="f16", hint="bf16"),
        _contender("ctranslate2-f32", "serving_ctranslate2", "f32", "f32", "ctranslate2", type="float32"),
        _contender("ctranslate2-int8", "serving_ctranslate2", "int8", "int8", "ctranslate2", type="int8"),
        _contender("vllm-f32", "serving_vllm", "f32", "f32", "vllm", dtype="f32"),
        _contender("vllm-bf16", "serving_vllm", "bf16", "bf16", "vllm", dtype="bf16"),
    )
}
