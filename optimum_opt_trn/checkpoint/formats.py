"""The file formats in which OPT weights are found: the tensors of a file, which are read later."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The name of a tensor in the file -> a function that reads it.
Readers = dict[str, Callable[[], Tensor]]


def open_file(file: Path) -> Readers:
    """The tensors of a safetensors or PyTorch file, as views of the mapped file.

    Raises:
        OSError, RuntimeError, SafetensorError, ValueError: if the file is broken, or of another format.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file)


def open_tensor(file: Path, name: str) -> Readers:
    """The only tensor of a PyTorch file, under the name `name`; raises as `open_file`."""
    if file.suffix == ".empty_json":
        raise ValueError("it describes random values instead of holding a tensor")
    tensor = _load(file)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it holds a {type(tensor).__name__}, not a tensor")
    return {name: _plain(tensor).detach}


def read_index(file: Path, key: str | None = "weight_map") -> dict[str, str]:
    """The file that holds each tensor, in the same directory, from the JSON index `file`.

    The names are under `key`, or at the top level if that is None.

    Raises:
        ValueError: if it is no index, or names a file elsewhere.
    """
    try:
        content = json.loads(file.read_text())
        names = dict(content[key] if key else content)
        if not names or not all(isinstance(text, str) for item in names.items() for text in item):
            raise ValueError("it does not name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a checkpoint index ({error!r}).") from error
    for name in sorted(set(names.values())):
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{file} points outside of its directory: {name!r}.")
    return names


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
