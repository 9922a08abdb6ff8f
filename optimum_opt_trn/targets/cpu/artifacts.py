"""Ahead-of-time compiled stages on disk: how they are made, and when they may be used."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._inductor import aoti_load_package
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import OPTConfig
from transformers.utils import logging

from ... import modeling_opt, parallel, products, sampling, sharding
from ...checkpoint import CheckpointError
from ...configuration_opt import OPTNeuronConfig
from ..manifest import MANIFEST_NAME, graph_key, sha256
from . import stages as stages_module
from .compiler import compile_stage, has_compiler
from .compiler import host as this_host
from .stages import StageExport, Stages


logger = logging.get_logger(__name__)


def compile_stages(
    config: OPTConfig, neuron_config: OPTNeuronConfig, exports: Mapping[str, StageExport], directory: Path
) -> None:
    """Compiles every stage of `exports` to `directory` and writes the manifest, last.

    Where this host has no C++ compiler, the manifest lists no artifacts, one warning says so, and the export runs
    eagerly; as it does without exports.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if exports and not has_compiler():
        logger.warning(
            "No C++ compiler was found, so this export is not compiled: it will run eagerly, correct and slower. "
            "Install g++ (or set CXX) and export again."
        )
        exports = {}
    artifacts: dict[str, dict[str, Any]] = {}
    for name, export in (progress := tqdm(exports.items(), unit="graph", desc="Compiling", disable=not exports)):
        progress.set_postfix_str(name)
        file = directory / f"{name}.pt2"
        with warnings.catch_warnings():
            # torch.export's remarks on its own internals.
            warnings.simplefilter("ignore", FutureWarning)
            compile_stage(export(), file)
        artifacts[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"host": this_host(), "graph": _graph_key(config, neuron_config), "artifacts": artifacts}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def load_stages(config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path) -> Stages | None:
    """The compiled stages; None, with one warning, where they cannot be used on this host.

    Raises:
        CheckpointError: if the manifest or an artifact is missing or broken.
    """
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        host, graph = dict(manifest["host"]), manifest["graph"]
        artifacts = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["artifacts"].items()}
        if artifacts and artifacts.keys() != {field.name for field in dataclasses.fields(Stages)}:
            raise ValueError(f"it lists {', '.join(artifacts)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST_NAME} is missing or broken ({error}): export the model again, or load it with "
            "eager=True."
        ) from error
    reason = None
    if not artifacts:
        reason = "it was exported without compilation"
    elif graph != _graph_key(config, neuron_config):
        reason = "its graphs were compiled for other shapes, or by another version of optimum_opt_trn"
    else:
        here = this_host()
        differing = [f"{key} {host.get(key)} (here {here[key]})" for key in here if host.get(key) != here[key]]
        if differing:
            reason = "it was compiled for " + ", ".join(differing)
    if reason:
        logger.warning(
            f"{directory.parent} runs eagerly, correct and slower: {reason}. To compile it, export it here."
        )
        return None
    for name, (size, digest) in artifacts.items():
        file = directory / f"{name}.pt2"
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise CheckpointError(
                f"{file} is missing or not what the manifest says: export the model again, or load it with eager=True."
            )
    return Stages(**{name: _load(directory / f"{name}.pt2") for name in artifacts})


def _load(file: Path) -> Callable[..., Any]:
    loader = aoti_load_package(str(file)).loader

    def run(*arguments: Any) -> Tensor | list[Tensor]:
        # The package's own __call__ checks the structure of the arguments, at a cost that many small calls feel.
        results = loader.run(tree_leaves(arguments))
        return results[0] if len(results) == 1 else results

    return run


def _graph_key(config: OPTConfig, neuron_config: OPTNeuronConfig) -> str:
    # Not of the depth: one layer's graph serves all of them.
    modules = (modeling_opt, parallel, sharding, products, sampling, stages_module)
    return graph_key(config, neuron_config, modules)
