"""What an export for `cpu` has besides its checkpoint: copies of weights, of which decoding reads less.

OPT's activation is a ReLU, after which most of fc2's inputs are exactly 0. Their weights are columns of the stored
matrix, two bytes of each row, and memory is read in lines of 64. So each layer's fc2 is stored again, as
`(ffn, hidden)`. Of its fc1 there is a copy in int8, which tells which they are (csrc/screened.h), and one of the head
(screened_head.py). bfloat16 matrices of layers have coded copies (coded.py), fc2 that instead of the one by unit.
That is data: an export's directory holds no code for `cpu`, and none in it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from .coded import BLOCK, CodedCopy, can_encode, coded_bytes, encode
from .int8_copy import CopyMaker, Int8Copy, Screen, copy_specs


logger = logging.get_logger(__name__)

_FC2 = "fc2.weight"
TENSOR_NAME = "fc2.weight_by_unit"
_CODED = "_coded"
_FC1, _HEAD = "fc1", "lm_head"
# Units or outputs that are copied at a time.
_AT_ONCE = 512


@dataclass
class Copies:
    """What `compiled/` has for decoding.

    Args:
        screens: of each layer's fc1, or none.
        coded: matrices of layers and their copies.
        head: the copy of the head, if there is one.
    """

    screens: list[Screen] = field(default_factory=list)
    coded: list[tuple[Tensor, CodedCopy]] = field(default_factory=list)
    head: Int8Copy | None = None


def write_artifacts(config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, eager: bool) -> None:
    """Writes `compiled/` of the export in `directory`: the copies, and the manifest, last.

    Each layer has a file, if the model's activation is a ReLU or its weights are bfloat16; so has the head, if it is
    not int8 already. Only the manifest is written with `eager`. Weights are finite, or skipping would hide that 0
    times infinity is NaN: no checkpoint with others is split.
    """
    compiled = directory / COMPILED_DIR
    compiled.mkdir(parents=True, exist_ok=True)
    copies = {} if eager else _copies(config, neuron_config)
    sources = _checkpoint_hashes(directory) if copies else {}
    artifacts: dict[str, dict[str, Any]] = {}
    total = sum(spec.bytes for specs in copies.values() for spec in _stored(specs, set(specs)).values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Storing copies for decoding", leave=False) as progress:
        for name, specs in copies.items():
            source = directory / CHECKPOINT_DIR / name
            if name == OUTER_FILE:
                chunks = _head_chunks(config, source)
            else:
                names = [copy for copy in specs if copy.endswith(_CODED)]
                coded = {copy for copy in names if all(map(can_encode, _pieces(source, copy)))}
                specs, chunks = _stored(specs, coded), _layer_chunks(source)
            size, digest = write_tensors(compiled / name, specs, chunks, progress.update)
            artifacts[name] = {"bytes": size, "sha256": digest, "checkpoint": sources[name]}
    manifest = {"format": 2, "artifacts": artifacts}
    (compiled / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def use_artifacts(
    layers: list[Weights], config: OPTConfig, neuron_config: OPTNeuronConfig, directory: Path, group: RankGroup
) -> Copies:
    """Replaces fc2 in `layers` by the same values stored by unit, for the layers that `compiled/` has them of.

    Exports of earlier versions have none, or no copies in int8 and no coded ones. The library of kernels that they
    have is not loaded, nor is any other file that the manifest does not list; a warning names them.

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
    ranges = [shard_range(config.ffn_dim, rank, group.tp_degree)[:2] for rank in group.ranks]
    found = Copies(head=_int8_copy(_HEAD, stored.get(OUTER_FILE, {})))
    for index, weights in enumerate(layers):
        copy = stored.get(layer_file(index), {})
        if TENSOR_NAME in copy:
            weights[_FC2] = [copy[TENSOR_NAME][start:stop].T for start, stop in ranges]
        if fc1 := _int8_copy(_FC1, copy):
            found.screens.append(Screen([fc1.rows(start, stop) for start, stop in ranges]))
        for name in copy:
            if name.endswith(_CODED):
                found.coded += _shards(weights, name, copy[name], group)
    if len(found.screens) != len(layers):
        found.screens = []
    return found


def _shards(weights: Weights, name: str, coded: Tensor, group: RankGroup) -> Iterator[tuple[Tensor, CodedCopy]]:
    """A layer's shards of a matrix and their coded copies, parts of the copy `name`; none if its columns are cut."""
    by_unit = name == TENSOR_NAME + _CODED
    shards = weights[_FC2 if by_unit else name.removesuffix(_CODED)]
    for rank, shard in zip(group.ranks, shards, strict=True):
        rows, columns = shard.T.shape if by_unit else shard.shape
        start, stop, _ = shard_range(len(coded), rank, group.tp_degree) if rows < len(coded) else (0, rows, 0)
        if columns % BLOCK == 0 and coded_bytes(columns) == coded.shape[1]:
            yield shard, CodedCopy(coded[start:stop], by_unit)


def _copies(config: OPTConfig, neuron_config: OPTNeuronConfig) -> dict[str, dict[str, TensorSpec]]:
    """The files that an export can have, under the names of those that they are made from, and their tensors."""
    copies, relu = {}, config.activation_function == "relu"
    dtype = neuron_config.weight_dtype or neuron_config.amp
    hidden, ffn = config.hidden_size, config.ffn_dim
    specs = {TENSOR_NAME: TensorSpec((ffn, hidden), dtype)} if relu else {}
    if relu and dtype != "int8":
        specs.update(copy_specs(_FC1, ffn, hidden))
    if dtype == "bf16" and BLOCK:
        shapes = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "out")}
        shapes |= {f"{_FC1}.weight": (ffn, hidden)} | ({TENSOR_NAME: (ffn, hidden)} if relu else {_FC2: (hidden, ffn)})
        for name, (rows, columns) in shapes.items():
            if columns % BLOCK == 0:
                specs[name + _CODED] = TensorSpec((rows, coded_bytes(columns)), "int8")
    if specs:
        copies.update({layer_file(index): specs for index in range(config.num_hidden_layers)})
    if not has_int8_head(config, neuron_config.weight_dtype):
        copies[OUTER_FILE] = copy_specs(_HEAD, config.vocab_size, config.word_embed_proj_dim)
    return copies


def _stored(specs: dict[str, TensorSpec], coded: set[str]) -> dict[str, TensorSpec]:
    """The tensors that a file has, if of the coded ones it has those in `coded`; fc2 is there once."""
    left_out = TENSOR_NAME if TENSOR_NAME + _CODED in coded else None
    return {
        name: spec for name, spec in specs.items() if name != left_out and (name in coded or not name.endswith(_CODED))
    }


def _layer_chunks(source: Path) -> Callable[[str], Iterator[Tensor]]:
    """What gives the tensors of the copies of the layer in `source`, in pieces."""
    fc1 = CopyMaker(_read(source, f"{_prefix(source)}fc1.weight"))

    def chunks(name: str) -> Iterator[Tensor]:
        if name.endswith(_CODED):
            return map(encode, _pieces(source, name))
        return _pieces(source, name) if name == TENSOR_NAME else fc1.chunks(name)

    return chunks


def _pieces(source: Path, name: str) -> Iterator[Tensor]:
    """The matrix that the copy `name` is made from, in pieces, with the rows that the copy has."""
    if (matrix := name.removesuffix(_CODED)) != TENSOR_NAME:
        yield from _read(source, _prefix(source) + matrix).split(_AT_ONCE)
        return
    for columns in _read(source, _prefix(source) + _FC2).split(_AT_ONCE, dim=1):
        yield columns.T.contiguous()


def _prefix(source: Path) -> str:
    return layer_prefix(int(source.stem.removeprefix("layer_")))


def _head_chunks(config: OPTConfig, source: Path) -> Callable[[str], Iterator[Tensor]]:
    return CopyMaker(_read(source, TOKEN_EMBEDDINGS if config.tie_word_embeddings else HEAD)).chunks


def _int8_copy(matrix: str, tensors: dict[str, Tensor]) -> Int8Copy | None:
    """The copy of `matrix` among `tensors`, if it is there."""
    names = list(copy_specs(matrix, 0, 0))
    return Int8Copy(*map(tensors.__getitem__, names)) if names[0] in tensors else None


def _read_copy(
    file: Path, specs: dict[str, TensorSpec], entry: dict[str, Any], source: str | None
) -> dict[str, Tensor]:
    """The tensors of a copy; `entry` is the manifest's, `source` the hash of what it should have been made from."""
    again = "export the model again, or load it with eager=True."
    if not file.is_file() or file.stat().st_size != entry.get("bytes"):
        raise CheckpointError(f"{file} is missing or not what the manifest says: {again}")
    if entry.get("checkpoint") != source:
        raise CheckpointError(f"{file} was made from another {CHECKPOINT_DIR}/{file.name}: {again}")
    with _opened(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in _stored_in(set(opened.keys()), specs)}
    for name, stored in tensors.items():
        spec, dtype = specs[name], to_torch(specs[name].dtype)
        if stored.shape != spec.shape or stored.dtype != dtype:
            found = f"{stored.dtype} {tuple(stored.shape)}"
            raise CheckpointError(f"{file}: {name} is {found}, not {dtype} {spec.shape}: {again}")
    return tensors


def _stored_in(names: set[str], specs: dict[str, TensorSpec]) -> list[str]:
    """The tensors to read from a file with `names`. Earlier versions had no int8 copy of fc1, and no coded ones."""
    expected = _stored(specs, {name for name in names if name.endswith(_CODED)})
    int8 = copy_specs(_FC1, 0, 0)
    return [name for name in expected if name not in int8 or names & set(int8)]


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or broken ({error}). Export the model again.") from error


def _checkpoint_hashes(directory: Path) -> dict[str, str]:
    """Of each file of the export's checkpoint, as its manifest has it."""
    manifest = read_manifest(directory / CHECKPOINT_DIR / SPLIT_MANIFEST_NAME)
    return {name: entry.sha256 for name, entry in manifest.files.items()} if manifest else {}
