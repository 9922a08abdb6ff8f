"""The split checkpoint's manifest: the size and hash of each file, and what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .layout import TensorSpec
from .stream import Progress, sha256_file


MANIFEST_NAME = "split_manifest.json"
# The files that are done, while the split checkpoint is being written.
UNFINISHED_NAME = "split_manifest.unfinished.json"

# To be raised when the meaning of a manifest changes.
_FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """A file: its size in bytes, its SHA-256, and the key of what it was made from (see `source_key`)."""

    bytes: int
    sha256: str
    source: str

    def fits(self, file: Path) -> bool:
        """Whether the file is there and of this size."""
        return file.is_file() and file.stat().st_size == self.bytes

    def is_intact(self, file: Path, progress: Progress = lambda _: None) -> bool:
        """Whether the file is there, whole and unchanged; reads all of it."""
        return self.fits(file) and sha256_file(file, progress) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """The files of a split checkpoint in `amp` (`f16`, `bf16` or `f32`), by their names."""

    amp: str
    files: dict[str, FileEntry]

    def write(self, path: Path, sync: bool = True) -> None:
        """Writes the manifest; see `write_json`."""
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        write_json(path, {"format": _FORMAT, "amp": self.amp, "files": files}, sync)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in the file `path`; None if there is none.

    Raises:
        ValueError: if it is broken, or of a later version.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        files = {str(name): FileEntry(**entry) for name, entry in content["files"].items()}
        for entry in files.values():
            if not (isinstance(entry.bytes, int) and isinstance(entry.sha256, str) and isinstance(entry.source, str)):
                raise ValueError("an entry without size or hash")
        return Manifest(str(content["amp"]), files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is broken, or of a later version of optimum_opt_trn ({error!r}).") from error


def source_key(specs: Mapping[str, TensorSpec], identity: str) -> str:
    """A hash of what a file is made from: names, shapes and dtypes of its tensors, and their source's identity."""
    described = (_FORMAT, sorted((name, spec.shape, spec.dtype) for name, spec in specs.items()), identity)
    return hashlib.sha256(repr(described).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any], sync: bool = True) -> None:
    """Writes a JSON file completely or not at all; with `sync`, even if the power fails."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
