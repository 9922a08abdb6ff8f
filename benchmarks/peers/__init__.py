"""Who is measured: ours in its variants, and every peer in its settings.

A contender runs in a worker process of its own (`peers/worker.py`), in the virtual environment that its requirements
file pins (`peers/NAME.txt`). Nothing but the standard library is imported here, for every environment imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


# Bytes of one weight.
WEIGHT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Contender:
    """One way to run an OPT.

    Args:
        name: what tables and options call it.
        module: of `peers/`, with the class that runs it.
        weights: in what the weights of matrices are held (`f32`, `f16`, `bf16`, `int8`).
        compute: in what products are computed (`f32`, `f16`, `bf16`, `int8`).
        environment: the requirements file; None for the interpreter that runs the harness.
        conversion: what the checkpoint is converted to first, a folder's name; None if it is loaded as it is.
        options: for the class in `module`.
        processes: that torchrun starts; 1 for none of it.
        variables: of its environment, more than others have.
    """

    name: str
    module: str
    weights: str
    compute: str
    environment: str | None = None
    conversion: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    processes: int = 1
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"


def _ours(name: str, amp: str, tp_degree: int = 1, processes: int = 1, weight_dtype: str | None = None) -> Contender:
    compute = "bf16" if amp == "bf16" else "f32"
    precision = "medium" if amp == "bf16" else "highest"
    options = {"amp": amp, "tp_degree": tp_degree, "weight_dtype": weight_dtype, "precision": precision}
    return Contender(name, "ours", weight_dtype or amp, compute, None, name, options, processes)


def _transformers(dtype: str, how: str = "eager") -> Contender:
    name = f"transformers-{dtype}" if how == "eager" else f"transformers-{how}-{dtype}"
    return Contender(name, "transformers", dtype, dtype, "transformers", None, {"dtype": dtype, "how": how})


def _passive(peer: Contender) -> Contender:
    """OpenMP's threads sleep while they wait, so that a busy machine does not stall those that spin."""
    return replace(peer, name=f"{peer.name}-passive", variables={"OMP_WAIT_POLICY": "PASSIVE"})


def _openvino(name: str, weights: str, hint: str) -> Contender:
    options = {"weights": weights, "hint": hint}
    return Contender(f"openvino-{name}", "openvino", weights, hint, "openvino", f"openvino-{weights}", options)


def _ctranslate2(kind: str) -> Contender:
    compute = "int8" if kind == "int8" else "f32"
    options = {"type": {"int8": "int8", "f32": "float32"}[kind]}
    return Contender(
        f"ctranslate2-{kind}", "ctranslate2", kind, compute, "ctranslate2", f"ctranslate2-{kind}", options
    )


def _torchao(how: str) -> Contender:
    return Contender(f"torchao-{how}-int8", "torchao", "int8", "bf16", "torchao", None, {"dtype": "bf16", "how": how})


def _onnxruntime(dtype: str) -> Contender:
    name = f"onnxruntime-{dtype}"
    return Contender(name, "onnxruntime", dtype, dtype, "onnxruntime", name, {"dtype": dtype})


OURS = {
    contender.name: contender
    for contender in (
        _ours("ours-f16", "f16"),
        _ours("ours-bf16", "bf16"),
        _ours("ours-int8", "f16", weight_dtype="int8"),
        _ours("ours-f16-tp2", "f16", tp_degree=2),
        _ours("ours-f16-tp4", "f16", tp_degree=4),
        _ours("ours-f16-torchrun2", "f16", tp_degree=2, processes=2),
    )
}
PEERS = {
    contender.name: contender
    for contender in (
        _transformers("f16"),
        _transformers("bf16"),
        _transformers("f32"),
        _passive(_transformers("f16")),
        _passive(_transformers("bf16")),
        _passive(_transformers("f32")),
        _transformers("f16", "compiled"),
        _transformers("bf16", "compiled"),
        _transformers("f32", "compiled"),
        _transformers("f16", "tuned"),
        _transformers("bf16", "tuned"),
        _openvino("f16-f32", "f16", "f32"),
        _openvino("f16-bf16", "f16", "bf16"),
        _openvino("int8", "int8", "f32"),
        _ctranslate2("f32"),
        _ctranslate2("int8"),
        _torchao("compiled"),
        _torchao("tuned"),
        _onnxruntime("f32"),
        _onnxruntime("f16"),
    )
}


def ours_beside(peer: Contender) -> str:
    """Which of ours a peer is compared with: what has its class of precision."""
    return "ours-bf16" if peer.compute == "bf16" and peer.weights != "int8" else "ours-f16"


def groups() -> dict[str, list[Contender]]:
    """What is measured interleaved, by the name that selects it: ours and a peer, or ours in several variants.

    Beside peers that compute in bfloat16 stands our bfloat16 export, beside those with int8 weights both of ours.
    """
    ours = OURS["ours-f16"]
    found = {peer.name: [OURS[ours_beside(peer)], peer] for peer in PEERS.values()}
    for peer in PEERS.values():
        if peer.weights == "int8":
            found[peer.name].insert(1, OURS["ours-int8"])
    found["int8"] = [ours, OURS["ours-int8"]]
    found["tensor-parallel"] = [ours, OURS["ours-f16-tp2"], OURS["ours-f16-tp4"]]
    found["torchrun"] = [ours, OURS["ours-f16-torchrun2"]]
    return found
