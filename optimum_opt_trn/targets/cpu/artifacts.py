"""What an export for `cpu` has besides its checkpoint: copies of weights, of which decoding reads less.

OPT's activation is a ReLU, after which most of fc2's inputs are exactly 0. Their weights are columns of the stored
matrix, two bytes of each row, and memory is read in lines of 64. So each layer's fc2 is stored again, as
`(ffn, hidden)`. Of the head there is a copy in int8 (screened_head.py). That is data: an export's directory holds no
code for `cpu`, and none in it is loaded.
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
from ...checkpoint.layout import (
    CHECKPOINT_DIR,
    HEAD,
    OUTER_FILE,
    TOKEN_EMBEDDINGS,
    TensorSpec,
    has_int8_head,
    layer_file,
    layer_prefix,
)
from ...checkpoint.manifest import MANIFEST_NAME as SPLIT_MANIFEST_NAME
from ...checkpoint.manifest import read_manifest
from ...checkpoint.stream import write_tensors
from ...configuration_opt import OPTNeuronConfig
from ...dtypes import to_torch
from ...model.parallel import RankGroup, Weights
from ...model.shapes import shard_range
from ..base import COMPILED_DIR
from ..manifest import MANIFEST_NAME
from .screened_head import ERROR, LENGTH, SCALE, WEIGHT, HeadCopy, copy_rows


logger = logging.get_logger(__name__)

TENSOR_NAME = "fc2.weight_by_unit"
# Units or words that are copied at a time.
_AT_ONCE = 512


def write_artifacts(config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
    """Writes `compiled/` of the export in `directory`: the copies, and the manifest, last.

    Each layer's fc2 has a file, if the model's activation is a ReLU; so has the head, if it is not int8 already. Only
    the manifest is written with `eager`. Weights are finite, or skipping would hide that 0 times infinity is NaN: no
    checkpoint with others is split.
    """
    compiled = directory / COMPILED_DIR
    compiled.mkdir(parents=True, exist_ok=True)
    copies = {} if eager else _copies(config, neuron_config)
    sources = _checkpoint_hashes(directory) if copies else {}
    artifacts: dict[str, dict[str, Any]] = {}
    total = sum(spec.bytes for specs in copies.values() for spec in specs.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Storing copies for decoding", leave=False) as progress:
        for name, specs in copies.items():
            source = directory / CHECKPOINT_DIR / name
            chunks = partial(_head_copy, config, source) if name == OUTER_FILE else partial(_by_unit, source)
            size, digest = write_tensors(compiled / name, specs, chunks, progress.update)
            artifacts[name] = {"bytes": size, "sha256": digest, "checkpoint": sources[name]}
    manifest = {"format": 2, "artifacts": artifacts}
    (compiled / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def use_artifacts(
    layers: list[Weights], config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, group: RankGroup
) -> HeadCopy | None:
    """Replaces fc2 in `layers` by the same values stored by unit, for the layers that `compiled/` has them of.

    Exports of earlier versions have none, or no copy of the head. The library of kernels that they have is not loaded,
    nor is any other file that the manifest does not list; a warning names them.

    Returns:
        The copy of the head, if there is one.

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
    copies = _copies(config, neuron_config)
    known = {MANIFEST_NAME, OUTER_FILE, *map(layer_file, range(len(layers)))}
    if foreign := sorted({file.name for file in compiled.iterdir()} - known):
        logger.warning(
            f"{compiled} holds {', '.join(foreign)}, which is not loaded: an export for cpu is data, and the kernels "
            "come with the package. Remove it, or export the model again."
        )
    stored = {
        name: _read_copy(compiled / name, specs, artifacts[name], sources.get(name))
        for name, specs in copies.items()
        if name in artifacts
    }
    for index, weights in enumerate(layers):
        if copy := stored.get(layer_file(index)):
            ranges = (shard_range(config.ffn_dim, rank, group.tp_degree)[:2] for rank in group.ranks)
            weights["fc2.weight"] = [copy[TENSOR_NAME][start:stop].T for start, stop in ranges]
    head = stored.get(OUTER_FILE)
    return None if head is None else HeadCopy(*(head[name] for name in (WEIGHT, SCALE, ERROR, LENGTH)))


def _copies(config: OPTConfig, neuron_config: OPTNeuronConfig) -> dict[str, dict[str, TensorSpec]]:
    """The files that a model's export has, under the names of those that they are made from, and their tensors."""
    copies = {}
    if config.activation_function == "relu":
        dtype = neuron_config.weight_dtype or neuron_config.amp
        by_unit = {TENSOR_NAME: TensorSpec((config.ffn_dim, config.hidden_size), dtype)}
        copies.update({layer_file(index): by_unit for index in range(config.num_hidden_layers)})
    if not has_int8_head(config, neuron_config.weight_dtype):
        words = config.vocab_size
        copies[OUTER_FILE] = {
            WEIGHT: TensorSpec((words, config.word_embed_proj_dim), "int8"),
            SCALE: TensorSpec((words, 1), "f32"),
            ERROR: TensorSpec((words,), "f32"),
            LENGTH: TensorSpec((words,), "f32"),
        }
    return copies


def _by_unit(source: Path, name: str) -> Iterator[Tensor]:
    """`fc2.weight.T` of the layer in `source`, in pieces."""
    prefix = layer_prefix(int(source.stem.removeprefix("layer_")))
    for columns in _read(source, f"{prefix}fc2.weight").split(_AT_ONCE, dim=1):
        yield columns.T.contiguous()


def _head_copy(config: OPTConfig, source: Path, name: str) -> Iterator[Tensor]:
    head = _read(source, TOKEN_EMBEDDINGS if config.tie_word_embeddings else HEAD)
    return copy_rows(name, head, _AT_ONCE)


def _read_copy(
    file: Path, specs: dict[str, TensorSpec], entry: dict[str, Any], source: str | None
) -> dict[str, Tensor]:
    """The tensors of a copy; `entry` is the manifest's, `source` the hash of what it should have been made from."""
    again = "export the model again, or load it with eager=True."
    if not file.is_file() or file.stat().st_size != entry.get("bytes"):
        raise CheckpointError(f"{file} is missing or not what the manifest says: {again}")
    if entry.get("checkpoint") != source:
        raise CheckpointError(f"{file} was made from another {CHECKPOINT_DIR}/{file.name}: {again}")
    tensors = {name: _read(file, name) for name in specs}
    for name, spec in specs.items():
        stored, dtype = tensors[name], to_torch(spec.dtype)
        if stored.shape != spec.shape or stored.dtype != dtype:
            found = f"{stored.dtype} {tuple(stored.shape)}"
            raise CheckpointError(f"{file}: {name} is {found}, not {dtype} {spec.shape}: {again}")
    return tensors


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
