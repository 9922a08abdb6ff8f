"""The compiled model on disk, and when it may be loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import OPTConfig

from ...checkpoint import CheckpointError
from ...checkpoint.layout import has_int8_head
from ...configuration_opt import OPTNeuronConfig
from ...model.shapes import cache_shape
from ..base import TargetError
from ..manifest import MANIFEST_NAME, sha256
from .trust import check_trusted, record_compiled


# Raised when a graph computes something else, or takes or returns something else, than before; exports that were
# compiled with another version are refused. tests/targets/neuron/graph_version_cases.py notices such changes.
GRAPH_VERSION = 5

# TorchScript, with a NEFF for each graph in it; optimum-neuron's name for the same.
MODEL_NAME = "model.pt"


def write_manifest(
    config: OPTConfig,
    neuron_config: OPTNeuronConfig,
    versions: dict[str, str],
    arguments: dict[str, str],
    directory: Path,
) -> None:
    """Writes the manifest of `directory`, last of all; it lists the model if that is there.

    Args:
        versions: of what compiled it.
        arguments: the compiler's, by graph.
    """
    file = directory / MODEL_NAME
    artifacts = {MODEL_NAME: {"bytes": file.stat().st_size, "sha256": sha256(file)}} if file.is_file() else {}
    manifest = {
        "versions": versions,
        "compiler_arguments": arguments,
        "graph": _graph_key(config, neuron_config),
        "artifacts": artifacts,
    }
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    if artifacts:
        record_compiled(str(artifacts[MODEL_NAME]["sha256"]))


def check_artifacts(
    config: OPTConfig,
    neuron_config: OPTNeuronConfig,
    versions: dict[str, str],
    directory: Path,
    trust_remote_code: bool,
) -> Path:
    """The compiled model, which may be loaded here.

    Raises:
        CheckpointError: if the manifest or the model is missing or broken.
        ValueError: if it was not compiled here, without `trust_remote_code`.
        TargetError: if there is no compiled model, or one of other shapes or of another version of the compiler.
    """
    manifest = _read(directory / MANIFEST_NAME)
    again = f"Export it again, from its own checkpoint if you like: optimum-cli export neuron -m {directory.parent} …"
    if not manifest["artifacts"]:
        raise TargetError(f"{directory.parent} was exported without compilation: load it with eager=True. {again}")
    if manifest["graph"] != _graph_key(config, neuron_config):
        raise TargetError(
            f"{directory.parent} was compiled for other shapes, or by another version of optimum_opt_trn. {again}"
        )
    differing = [
        f"{name} {manifest['versions'].get(name)} (here {here})"
        for name, here in versions.items()
        if manifest["versions"].get(name) != here
    ]
    if differing:
        raise TargetError(f"{directory.parent} was compiled by {', '.join(differing)}. {again}")
    file, entry = directory / MODEL_NAME, manifest["artifacts"].get(MODEL_NAME)
    if not file.is_file() or entry != {"bytes": file.stat().st_size, "sha256": sha256(file)}:
        raise CheckpointError(f"{file} is missing or not what the manifest says. {again}")
    check_trusted(file, entry["sha256"], trust_remote_code)
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(file.read_text()))
        wrong = [key for key in ("versions", "artifacts") if not isinstance(manifest[key], dict)]
        if wrong or not isinstance(manifest["graph"], str):
            raise ValueError("its entries are not those of a manifest")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is missing or broken ({error}): export the model again, or load it with eager=True."
        ) from error
    return manifest


def _graph_key(config: OPTConfig, neuron_config: OPTNeuronConfig) -> str:
    """A hash of all that graphs depend on: their version, the model's shape and the export's options.

    It is the same with the configuration of the source and with that of the export, whose head may be untied.
    """
    int8_head = has_int8_head(config, neuron_config.weight_dtype)
    tied = config.tie_word_embeddings and not int8_head
    of_weights = ("checkpoint_id", "checkpoint_revision", "adapter")
    options = {k: v for k, v in neuron_config.options().items() if k not in of_weights}
    model = (
        *(config.hidden_size, config.ffn_dim, config.vocab_size, config.word_embed_proj_dim),
        *(config.enable_bias, config.layer_norm_elementwise_affine, config.do_layer_norm_before),
        *(config._remove_final_layer_norm, tied, config.activation_function),
        *(config.num_hidden_layers, config.max_position_embeddings),
    )
    # Int8 exports of earlier versions, whose head is in amp, keep their keys and their graphs.
    head = ("int8 head",) if int8_head else ()
    parts = (GRAPH_VERSION, model, cache_shape(config, neuron_config), sorted(options.items()), *head)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
