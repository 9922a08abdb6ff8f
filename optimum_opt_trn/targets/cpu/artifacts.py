"""What an export for `cpu` has besides its checkpoint: fc2 stored by input unit, so that decoding can skip units.

OPT's activation is a ReLU, after which most of fc2's inputs are exactly 0. Their weights are columns of the stored
matrix, two bytes of each row, and memory is read in lines of 64. So each layer's fc2 is stored again, as
`(ffn, hidden)`. That is data: an export's directory holds no code for `cpu`, and none in it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import OPTConfig
from transformers.utils import logging

from ...checkpoint import CheckpointError
from ...checkpoint.layout import CHECKPOINT_DIR, TensorSpec, layer_file, layer_prefix
from ...checkpoint.manifest import MANIFEST_NAME as SPLIT_MANIFEST_NAME
from ...checkpoint.manifest import read_manifest
from ...checkpoint.stream import write_tensors
from ...configuration_opt import OPTNeuronConfig
from ...dtypes import to_torch
from ...model.parallel import RankGroup, Weights
from ...model.shapes import shard_range
from ..base import COMPILED_DIR
from ..manifest import MANIFEST_NAME


logger = logging.get_logger(__name__)

TENSOR_NAME = "fc2.weight_by_unit"
# Units that are transposed at a time.
_UNITS = 512


def write_artifacts(config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
    """Writes `compiled/` of the export in `directory`: a file for each layer's fc2, and the manifest, last.

    Only the manifest is written with `eager`, and for a model whose activation is not a ReLU. Weights are finite, or
    skipping would hide that 0 times infinity is NaN: no checkpoint with others is split.
    """
    compiled = directory / COMPILED_DIR
    compiled.mkdir(parents=True, exist_ok=True)
    artifacts: dict[str, dict[str, Any]] = {}
    if not eager and config.activation_function == "relu":
        sources = _checkpoint_hashes(directory)
        spec = TensorSpec((config.ffn_dim, config.hidden_size), neuron_config.weight_dtype or neuron_config.amp)
        total = config.num_hidden_layers * spec.bytes
        with tqdm(total=total, unit="B", unit_scale=True, desc="Storing fc2 by unit", leave=False) as progress:
            for index in range(config.num_hidden_layers):
                name = layer_file(index)
                weight = _read(directory / CHECKPOINT_DIR / name, f"{layer_prefix(index)}fc2.weight")
                by_unit = partial(_by_unit, weight)
                size, digest = write_tensors(compiled / name, {TENSOR_NAME: spec}, by_unit, progress.update)
                artifacts[name] = {"bytes": size, "sha256": digest, "checkpoint": sources[name]}
    manifest = {"format": 2, "artifacts": artifacts}
    (compiled / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def use_artifacts(
    layers: list[Weights], config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, group: RankGroup
) -> None:
    """Replaces fc2 in `layers` by the same values stored by unit, for the layers that `compiled/` has them of.

    Exports of earlier versions have none. The library of kernels that they have is not loaded, nor is any other file
    that the manifest does not list; a warning names them.

    Raises:
        CheckpointError: if the manifest or a file is missing or broken, or was made from another checkpoint.
    """
    compiled = directory / COMPILED_DIR
    try:
        manifest = json.loads((compiled / MANIFEST_NAME).read_text())
        listed = dict(manifest["artifacts"]) if manifest.get("format", 1) == 2 else {}
        artifacts = {name: dict(entry) for name, entry in listed.items()}
        sources = _checkpoint_hashes(directory) if artifacts else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{compiled / MANIFEST_NAME} is missing or broken ({error}): export the model again, or load it with "
            "eager=True."
        ) from error
    known = {MANIFEST_NAME, *map(layer_file, range(len(layers)))}
    if foreign := sorted({file.name for file in compiled.iterdir()} - known):
        logger.warning(
            f"{compiled} holds {', '.join(foreign)}, which is not loaded: an export for cpu is data, and the kernels "
            "come with the package. Remove it, or export the model again."
        )
    shape, dtype = (config.ffn_dim, config.hidden_size), to_torch(neuron_config.weight_dtype or neuron_config.amp)
    for index, weights in enumerate(layers):
        name = layer_file(index)
        if name not in artifacts:
            continue
        file, entry = compiled / name, artifacts[name]
        if not file.is_file() or file.stat().st_size != entry.get("bytes"):
            raise CheckpointError(
                f"{file} is missing or not what the manifest says: export the model again, or load it with eager=True."
            )
        if entry.get("checkpoint") != sources.get(name):
            raise CheckpointError(
                f"{file} was made from another {CHECKPOINT_DIR}/{name}: export the model again, or load it with "
                "eager=True."
            )
        stored = _read(file, TENSOR_NAME)
        if stored.shape != shape or stored.dtype != dtype:
            raise CheckpointError(
                f"{file}: {TENSOR_NAME} is {stored.dtype} {tuple(stored.shape)}, not {dtype} {shape}: "
                "export the model again, or load it with eager=True."
            )
        ranges = (shard_range(config.ffn_dim, rank, group.tp_degree)[:2] for rank in group.ranks)
        weights["fc2.weight"] = [stored[start:stop].T for start, stop in ranges]


def _by_unit(weight: Tensor, name: str) -> Iterator[Tensor]:
    """`weight.T`, in pieces."""
    for columns in weight.split(_UNITS, dim=1):
        yield columns.T.contiguous()


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or broken ({error}). Export the model again.") from error
    return tensor


def _checkpoint_hashes(directory: Path) -> dict[str, str]:
    """Of each file of the export's checkpoint, as its manifest has it."""
    manifest = read_manifest(directory / CHECKPOINT_DIR / SPLIT_MANIFEST_NAME)
    return {name: entry.sha256 for name, entry in manifest.files.items()} if manifest else {}
