"""The list of every file of an export or a split checkpoint, with sizes and hashes, that `verify` compares with.

A split checkpoint has it in its manifest (`manifest.py`), an export in `EXPORT_MANIFEST_NAME`. Both files are sealed:
they also have a hash of themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .layout import CHECKPOINT_DIR
from .stream import Progress


EXPORT_MANIFEST_NAME = "export_manifest.json"

# To be raised when the meaning of the manifest of an export changes.
_FORMAT = 1

# What people add to a repository on the hub. Nothing here reads it.
_NOT_LISTED = ("README.md",)


def sha256_file(file: Path, progress: Progress = lambda _: None) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


@dataclass(frozen=True)
class Listed:
    """A file: its size in bytes, and its SHA-256."""

    bytes: int
    sha256: str

    def fits(self, file: Path) -> bool:
        """Whether the file is there and of this size."""
        return file.is_file() and file.stat().st_size == self.bytes

    def is_intact(self, file: Path, progress: Progress = lambda _: None) -> bool:
        """Whether the file is there, whole and unchanged; reads all of it."""
        return self.fits(file) and sha256_file(file, progress) == self.sha256


def visible_files(directory: Path) -> dict[str, Path]:
    """The files below a directory by their relative names, in order, without hidden ones and the README of the hub."""
    found = {}
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if not name.startswith(".") and relative not in _NOT_LISTED:
                found[relative] = path
    return dict(sorted(found.items()))


def list_file(file: Path) -> Listed:
    """Reads a file, and makes sure that it is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return Listed(file.stat().st_size, sha256_file(file))


def list_text(text: str) -> Listed:
    """The entry of a file that will have this text."""
    content = text.encode()
    return Listed(len(content), hashlib.sha256(content).hexdigest())


def write_export_manifest(directory: Path, known: Mapping[str, Listed] | None = None) -> None:
    """Lists every file of the export in `directory`.

    Args:
        directory: the export, complete.
        known: entries of files, by their relative names. These files are not read.
    """
    files = visible_files(directory)
    files.pop(EXPORT_MANIFEST_NAME, None)
    listed = {name: (known or {}).get(name) or list_file(path) for name, path in files.items()}
    _write(directory, listed)


def _write(directory: Path, listed: Mapping[str, Listed]) -> None:
    content = {"format": _FORMAT, "files": {name: asdict(entry) for name, entry in sorted(listed.items())}}
    write_json(directory / EXPORT_MANIFEST_NAME, sealed(content))


def read_export_manifest(directory: Path) -> dict[str, Listed] | None:
    """The files of an export by their relative names; None if it has no manifest, as exports of earlier versions.

    Raises:
        ValueError: if the manifest is broken, has changed, or is of a later version.
    """
    file = directory / EXPORT_MANIFEST_NAME
    try:
        text = file.read_text()
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        check_seal(text, content)
        return {name: parse_entry(name, entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is broken, or of a later version of optimum_opt_trn ({name_error(error)})."
        ) from error


def record(directory: Path, names: tuple[str, ...] | None = None) -> None:
    """Brings the manifest of an export up to date after files of it were written again.

    Does nothing for an export without one, or with a broken one, which stays as it is.

    Args:
        directory: the export.
        names: the files, relative to `directory`; None for all outside of its subdirectories.
    """
    try:
        listed = read_export_manifest(directory)
    except ValueError:
        return
    if listed is None:
        return
    files = visible_files(directory)
    changed = names or [name for name in files if "/" not in name and name != EXPORT_MANIFEST_NAME]
    fresh = {name: list_file(files[name]) for name in changed if name in files}
    _write(directory, {**{name: entry for name, entry in listed.items() if name not in changed}, **fresh})


def checkpoint_entries(entries: Mapping[str, Listed]) -> dict[str, Listed]:
    """The entries of a split checkpoint, under the names that its files have in an export."""
    return {f"{CHECKPOINT_DIR}/{name}": Listed(entry.bytes, entry.sha256) for name, entry in entries.items()}


def differences(
    directory: Path, listed: Mapping[str, Listed], contents: bool, progress: Progress = lambda _: None
) -> Iterator[str]:
    """A sentence for each listed file that is missing or, with `contents`, not what was written."""
    for name, entry in listed.items():
        file = directory / name
        if not file.is_file():
            yield f"{file} is missing."
        elif not entry.fits(file):
            size = file.stat().st_size
            yield f"{file} has {size} bytes, and was written with {entry.bytes}: it is cut off or replaced."
        elif contents:
            try:
                intact = entry.is_intact(file, progress)
            except OSError as error:
                yield f"{file} cannot be read ({error.strerror})."
                continue
            if not intact:
                yield f"{file} has changed since it was written: its SHA-256 is not the one in the manifest."


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with a hash of itself."""
    return {**content, "sha256": list_text(json_text(content)).sha256}


def check_seal(text: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError if `text`, which was read as `content`, is not as `write_json` wrote it."""
    if text != json_text(sealed({name: value for name, value in content.items() if name != "sha256"})):
        raise ValueError("it has changed since it was written")


def parse_entry(name: str, entry: Mapping[str, Any]) -> Listed:
    """An entry of a manifest; raises ValueError if it is none, or names a file elsewhere."""
    found = Listed(entry["bytes"], entry["sha256"])
    if type(found.bytes) is not int or not isinstance(found.sha256, str):
        raise ValueError("an entry without size or hash")
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"{name!r} is outside of the directory")
    return found


def write_json(path: Path, content: Mapping[str, Any], sync: bool = True) -> None:
    """Writes a JSON file completely or not at all; with `sync`, even if the power fails."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(json_text(content))
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)


def name_error(error: Exception) -> str:
    """The error's kind and text; the text of a KeyError, for example, says little."""
    return f"{type(error).__name__}: {error}"


def json_text(content: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2) + "\n"
