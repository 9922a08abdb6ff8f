"""The formats in which OPT weights are found: which files there are, and the tensors of each, which are read later."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .layout import CheckpointError


logger = logging.get_logger(__name__)

# The split format of transformers-neuronx: a directory of this name with a file for each tensor, and an index in JSON.
OLD_SPLIT_DIR, OLD_SPLIT_INDEX = WEIGHTS_NAME, "key_to_filename.json"

# The name of a tensor in the file -> a function that reads it.
Readers = dict[str, Callable[[], Tensor]]


class Files(Protocol):
    """The files of a checkpoint, local or on the hub.

    `origin` is what messages call it. `directory` is the local directory; it is None if files are fetched. `find`
    returns a file's path, or None if there is no such file; it may fetch the file first. `identity` returns a text
    that changes when the file does. `discard` is called when a file is not needed any more.
    """

    origin: str
    directory: Path | None

    def find(self, name: str) -> Path | None: ...
    def identity(self, name: str) -> str: ...
    def discard(self, name: str) -> None: ...


class LocalFiles:
    """The files in a directory."""

    def __init__(self, directory: Path):
        self.origin = str(directory)
        self.directory: Path | None = directory
        self._path = directory

    def find(self, name: str) -> Path | None:
        file = self._path / name
        return file if file.is_file() else None

    def identity(self, name: str) -> str:
        file = (self._path / name).resolve()
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


def find_pieces(files: Files) -> list[Piece]:
    """The files that hold the weights: safetensors or PyTorch, single or sharded, or split by transformers-neuronx.

    Files in a local directory are opened now. If files are fetched, the index is believed, and each is fetched and
    opened when a tensor of it is needed.

    Raises:
        CheckpointError: if there are none, or if a file that the index names is missing or broken.
    """
    fetched = files.directory is None
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if files.find(single):
            return [_piece(files, single)]
        if path := files.find(index):
            shards: dict[str, list[str]] = {}
            for name, file in _read_index(path).items():
                shards.setdefault(file, []).append(name)
            return [_piece(files, file, shards[file] if fetched else None, index) for file in sorted(shards)]
    if path := files.find(f"{OLD_SPLIT_DIR}/{OLD_SPLIT_INDEX}"):
        named = _read_index(path, None)
        for file in named.values():
            if not fetched and not files.find(f"{OLD_SPLIT_DIR}/{file}"):
                raise CheckpointError(f"{files.origin} lacks {OLD_SPLIT_DIR}/{file}, which {OLD_SPLIT_INDEX} names.")
        return [_piece(files, f"{OLD_SPLIT_DIR}/{file}", [name], OLD_SPLIT_INDEX) for name, file in named.items()]
    raise CheckpointError(
        f"{files.origin} has no weights: expected {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME} or "
        f"{WEIGHTS_INDEX_NAME}."
    )


def _piece(files: Files, name: str, tensors: list[str] | None = None, index: str = "") -> Piece:
    def open_readers() -> Readers:
        file = files.find(name)
        if file is None:
            raise CheckpointError(f"{files.origin} lacks {name}, which its {index} names.")
        try:
            return _open_tensor(file, *(tensors or ())) if index == OLD_SPLIT_INDEX else open_file(file)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is broken or not a checkpoint file ({error}).") from error

    return Piece(open_readers, lambda _: files.identity(name), lambda: files.discard(name), tensors)


def _read_index(file: Path, key: str | None = "weight_map") -> dict[str, str]:
    """The file that holds each tensor, in the same directory, from the JSON index `file`.

    The names are under `key`, or at the top level if that is None.

    Raises:
        CheckpointError: if it is no index, or names a file elsewhere.
    """
    try:
        content = json.loads(file.read_text())
        names = dict(content[key] if key else content)
        if not names or not all(isinstance(text, str) for item in names.items() for text in item):
            raise ValueError("it does not name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a checkpoint index ({error!r}).") from error
    for name in sorted(set(names.values())):
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{file} points outside of its directory: {name!r}.")
    return names


def open_file(file: Path) -> Readers:
    """The tensors of a safetensors or PyTorch file, as views of the mapped file.

    Raises:
        OSError, RuntimeError, SafetensorError, ValueError: if the file is broken, or of another format.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file)


def _open_tensor(file: Path, name: str) -> Readers:
    """The only tensor of a PyTorch file, under the name `name`; raises as `open_file`."""
    if file.suffix == ".empty_json":
        raise ValueError("it describes random values instead of holding a tensor")
    tensor = _load(file)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it holds a {type(tensor).__name__}, not a tensor")
    return {name: _plain(tensor).detach}


def _safetensors(file: Path) -> Readers:
    opened = safe_open(file, framework="pt")
    return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118


def _pytorch(file: Path) -> Readers:
    tensors = _load(file)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by their names")
    return {
        name: _plain(tensor).detach
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _load(file: Path) -> object:
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"  # what torch.load looks at
    if not zipped and file.stat().st_size > 1 << 28:
        logger.warning(
            f"{file} has the format of PyTorch before 1.6, which cannot be mapped: all of it "
            f"({file.stat().st_size / 1e9:.1f} GB) is read into memory. If that is too much, convert it on "
            "a host with more, by torch.save(torch.load(file, weights_only=True), file)."
        )
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise ValueError("it is compressed, which PyTorch's own files are not")
        return torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
    except (RuntimeError, OSError):
        raise
    except Exception as error:  # an archive or pickle that was tampered with can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch's own words advise to load it all the same.
            reason = (
                "it holds more than tensors, which may be code and is not loaded: if you trust it, save the tensors "
                "as safetensors"
            )
        raise ValueError(reason) from error


def _plain(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError("it holds a tensor that is sparse, quantized or without data")
    return tensor
