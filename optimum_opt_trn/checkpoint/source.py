"""Reading OPT weights, a few megabytes at a time, from every format in which they are found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import OPTConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..dtypes import DTYPES, to_torch
from .formats import Readers, open_file, open_tensor, read_index
from .layout import TensorSpec, checkpoint_files


# Bytes of a tensor that are read, cast, checked and written at a time, in the wider dtype of source and output.
CHUNK_BYTES = 16 << 20

# The split format of transformers-neuronx: a directory of this name with a file for each tensor, and an index in JSON.
OLD_SPLIT_DIR, OLD_SPLIT_INDEX = WEIGHTS_NAME, "key_to_filename.json"

# Written by the first OPT conversions, and ignored by transformers as well.
_IGNORED = {"model.decoder.version"}


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, broken, or not of the model that its config.json describes."""


class Files(Protocol):
    """The files of a checkpoint, local or on the hub.

    `origin` is what messages call it. `find` returns a file's path, or None if there is no such file; it may download
    the file first. `identity` returns a text that changes when the file does. `discard` is called when a file is not
    needed any more.
    """

    origin: str

    def find(self, name: str) -> Path | None: ...
    def identity(self, name: str) -> str: ...
    def discard(self, name: str) -> None: ...


class LocalFiles:
    """The files in a directory."""

    def __init__(self, directory: Path):
        self.directory, self.origin = directory, str(directory)

    def find(self, name: str) -> Path | None:
        file = self.directory / name
        return file if file.is_file() else None

    def identity(self, name: str) -> str:
        file = (self.directory / name).resolve()
        return f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"

    def discard(self, name: str) -> None:
        """Does nothing: the files are the user's."""


class Piece:
    """A part of a source, usually a file. It is opened when one of its tensors is read, and closed after the last.

    Args:
        open_readers: opens it.
        identity: returns a text that changes when any of the named tensors does.
        close: called when none of its tensors is needed any more.
        names: its tensors; by default it is opened to find them.
    """

    def __init__(
        self,
        open_readers: Callable[[], Readers],
        identity: Callable[[Collection[str]], str],
        close: Callable[[], None] = lambda: None,
        names: Collection[str] | None = None,
    ):
        self._open, self.identity, self._close = open_readers, identity, close
        self._readers = self._open() if names is None else None
        self.names = list(self._readers or ()) if names is None else list(names)

    @property
    def is_open(self) -> bool:
        return self._readers is not None

    def read(self, name: str) -> Tensor:
        if self._readers is None:
            self._readers = self._open()
        return self._readers[name]()

    def close(self) -> None:
        self._readers = None
        self._close()


class WeightSource:
    """The weights of a model: named tensors that are read when they are asked for.

    Args:
        pieces: the files, or other parts, that have them.
        origin: what error messages call the source.
        config: the model's configuration.
        directory: the source's directory, if it is a local one.

    Raises:
        CheckpointError: naming tensors that the model of `config` has and the source lacks, or the other way round,
            or that are of another shape, as far as their files are open.
    """

    def __init__(self, pieces: list[Piece], origin: str, config: OPTConfig, directory: Path | None = None):
        self.origin = origin
        self.config = config
        self.directory = directory
        self._pieces = pieces
        # Our name -> the piece that has it, and the name there.
        self._tensors: dict[str, tuple[int, str]] = {}
        for index, piece in enumerate(pieces):
            for name in piece.names:
                if (ours := _canonical_name(name)) not in _IGNORED:
                    self._tensors[ours] = index, name
        self._needed = self._check()

    def _check(self) -> set[str]:
        """Checks names, and the shapes of the tensors in open files; the names of the model's tensors."""
        config = self.config
        # Names and shapes are the same in every dtype.
        expected = {name: spec for specs in checkpoint_files(config, "f32").values() for name, spec in specs.items()}
        # Many files have a copy of a tied head; the embedding is what is read.
        found = set(self._tensors) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        missing, foreign = expected.keys() - found, found - expected.keys()
        for names, what in ((missing, "lacks"), (foreign, "holds, beyond what config.json says,")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                raise CheckpointError(f"{self.origin} {what} {len(names)} tensors: {shown}. Is it whole, and an OPT?")
        for name, spec in expected.items():
            if self._pieces[self._tensors[name][0]].is_open:
                self._tensor(name, spec)
        return set(expected)

    def last_piece(self, names: Collection[str]) -> int:
        """The index of the last piece that has any of `names`. Reading in this order opens each piece once."""
        return max(self._tensors[name][0] for name in names)

    def identity(self, names: Collection[str]) -> str:
        """A text that changes when the source of any of these tensors does."""
        pieces: dict[int, list[str]] = {}
        for name in sorted(names):
            index, theirs = self._tensors[name]
            pieces.setdefault(index, []).append(theirs)
        return "\n".join(self._pieces[index].identity(theirs) for index, theirs in sorted(pieces.items()))

    def release(self, names: Collection[str]) -> None:
        """Marks these tensors as done; pieces without any other tensor are closed."""
        self._needed -= set(names)
        needed = {self._tensors[name][0] for name in self._needed}
        for index in {self._tensors[name][0] for name in names} - needed:
            self._pieces[index].close()

    def chunks(self, name: str, spec: TensorSpec) -> Iterator[Tensor]:
        """The tensor's rows, some at a time, in the dtype of `spec`, contiguous.

        Raises:
            CheckpointError: if the tensor is missing, has another shape or no floating-point dtype, or has values
                that are not finite after the cast.
        """
        tensor = self._tensor(name, spec)
        row_bytes = max(1, tensor[0].numel() * max(tensor.element_size(), DTYPES[spec.dtype].bytes))
        for rows in tensor.split(max(1, CHUNK_BYTES // row_bytes)):
            try:
                cast = rows.to("cpu", to_torch(spec.dtype)).contiguous()
                # Both are NaN if any element is. This is several times faster than isfinite of each element.
                extremes = torch.stack(torch.aminmax(cast))
            except RuntimeError as error:
                raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error
            if not torch.isfinite(extremes).all():
                cause = "in the source" if not torch.isfinite(rows).all() else f"once cast to {cast.dtype}: try bf16"
                raise CheckpointError(f"{self.origin}: {name} has values that are not finite {cause}.")
            yield cast

    def read(self, name: str, spec: TensorSpec) -> Tensor:
        """The tensor as a whole; see `chunks`."""
        return torch.cat(list(self.chunks(name, spec)))

    def _tensor(self, name: str, spec: TensorSpec) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.origin} lacks the tensor {name}.")
        index, theirs = self._tensors[name]
        try:
            tensor = self._pieces[index].read(theirs)
        except KeyError as error:
            raise CheckpointError(f"{self.origin} lacks the tensor {name}, which its index names.") from error
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {spec.shape}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.origin}: {name} has dtype {tensor.dtype}, not a floating-point dtype.")
        if tensor.is_meta:
            raise CheckpointError(f"{self.origin}: {name} has no data: it is on the meta device.")
        return tensor


def open_model(model: PreTrainedModel) -> WeightSource:
    """The weights of a loaded `OPTForCausalLM`, which is not changed; raises as `WeightSource`."""
    state = model.state_dict()

    def identity(names: Collection[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            tensor = state[name].detach()
            digest.update(f"{name} {tensor.dtype}".encode())
            for rows in tensor.split(max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))):
                digest.update(rows.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    readers: Readers = {name: tensor.detach for name, tensor in state.items()}
    return WeightSource([Piece(lambda: readers, identity)], "the loaded model", model.config)


def open_directory(directory: Path, config: OPTConfig) -> WeightSource:
    """The weights in a local directory, those of a model of `config`.

    They may be safetensors or PyTorch files, in one piece or sharded with an index, or a split checkpoint of
    transformers-neuronx.

    Raises:
        CheckpointError: if there are none, if a file that the index names is missing or broken, or if they are not
            those of the model (see `WeightSource`).
    """
    files = LocalFiles(directory)
    return WeightSource(_pieces(files, lazily=False), files.origin, config, directory)


def open_files(files: Files, config: OPTConfig) -> WeightSource:
    """The weights in `files`, those of a model of `config`; see `open_directory`.

    The index is believed: each shard is found and opened when a tensor of it is needed.
    """
    return WeightSource(_pieces(files, lazily=True), files.origin, config)


def _pieces(files: Files, lazily: bool) -> list[Piece]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if files.find(single):
            return [_file(files, single)]
        if path := files.find(index):
            shards: dict[str, list[str]] = {}
            for name, file in _indexed(path).items():
                shards.setdefault(file, []).append(name)
            return [_file(files, file, shards[file] if lazily else None, index) for file in sorted(shards)]
    if path := files.find(f"{OLD_SPLIT_DIR}/{OLD_SPLIT_INDEX}"):
        named = _indexed(path, None)
        for file in named.values():
            if not lazily and not files.find(f"{OLD_SPLIT_DIR}/{file}"):
                raise CheckpointError(f"{files.origin} lacks {OLD_SPLIT_DIR}/{file}, which {OLD_SPLIT_INDEX} names.")
        return [_file(files, f"{OLD_SPLIT_DIR}/{file}", [name], OLD_SPLIT_INDEX) for name, file in named.items()]
    raise CheckpointError(
        f"{files.origin} has no weights: expected {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME} or "
        f"{WEIGHTS_INDEX_NAME}."
    )


def _indexed(path: Path, key: str | None = "weight_map") -> dict[str, str]:
    try:
        return read_index(path, key)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _file(files: Files, name: str, tensors: list[str] | None = None, index: str = "") -> Piece:
    def open_readers() -> Readers:
        file = files.find(name)
        if file is None:
            raise CheckpointError(f"{files.origin} lacks {name}, which its {index} names.")
        try:
            return open_tensor(file, *(tensors or ())) if index == OLD_SPLIT_INDEX else open_file(file)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is broken or not a checkpoint file ({error}).") from error

    return Piece(open_readers, lambda _: files.identity(name), lambda: files.discard(name), tensors)


def _canonical_name(name: str) -> str:
    """The name as transformers' OPTForCausalLM spells it: OPTModel's checkpoints lack the prefix `model.`."""
    return f"model.{name}" if name.startswith("decoder.") else name
