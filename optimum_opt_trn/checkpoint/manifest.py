"""The split checkpoint's manifest: the size and hash of each file, and what the files of weights were made from.

With it, a run of the writer finds files that need not be written again: its own and those of the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils import logging

from ..dtypes import to_torch
from .layout import FileSpecs, TensorSpec
from .listing import Listed, check_seal, name_error, parse_entry, sealed, write_json


logger = logging.get_logger(__name__)

MANIFEST_NAME = "split_manifest.json"
# The files that are done, while the split checkpoint is being written.
UNFINISHED_NAME = "split_manifest.unfinished.json"

# To be raised when the meaning of a manifest changes.
_FORMAT = 1


@dataclass(frozen=True)
class FileEntry(Listed):
    """A file of weights, with the key of what it was made from (see `source_key`)."""

    source: str


@dataclass(frozen=True)
class Manifest:
    """The files of a split checkpoint in `amp` (`f16`, `bf16` or `f32`), by their names.

    Args:
        amp: dtype of the weights.
        files: the files of weights.
        others: all other files except for the manifest. None in a manifest of an earlier version, which had no entry
            for them and no hash of itself.
    """

    amp: str
    files: dict[str, FileEntry]
    others: dict[str, Listed] | None = None

    def write(self, path: Path, sync: bool = True) -> None:
        """Writes the manifest; see `write_json`."""
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        others = {name: asdict(entry) for name, entry in sorted((self.others or {}).items())}
        write_json(path, sealed({"format": _FORMAT, "amp": self.amp, "files": files, "others": others}), sync)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in the file `path`; None if there is none.

    Raises:
        ValueError: if it is broken, has changed, or is of a later version.
    """
    try:
        text = path.read_text()
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}")
        others = None
        if "others" in content or "sha256" in content:
            check_seal(text, content)
            others = {name: parse_entry(name, entry) for name, entry in content["others"].items()}
        files = {}
        for name, entry in content["files"].items():
            listed = parse_entry(name, entry)
            if not isinstance(entry["source"], str):
                raise ValueError("an entry without source")
            files[name] = FileEntry(listed.bytes, listed.sha256, entry["source"])
        return Manifest(str(content["amp"]), files, others)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is broken, or of a later version of optimum_opt_trn ({name_error(error)})."
        ) from error


def source_key(specs: Mapping[str, TensorSpec], identity: str) -> str:
    """A hash of what a file is made from: names, shapes and dtypes of its tensors, and their source's identity."""
    described = (_FORMAT, sorted((name, spec.shape, spec.dtype) for name, spec in specs.items()), identity)
    return hashlib.sha256(repr(described).encode()).hexdigest()


def intact_files(directory: Path, keys: Mapping[str, str]) -> dict[str, FileEntry]:
    """The files in a directory that need not be written again: complete, and made from the same source."""
    found: dict[str, FileEntry] = {}
    for name in (MANIFEST_NAME, UNFINISHED_NAME):
        try:
            manifest = read_manifest(directory / name)
        except ValueError as error:
            logger.warning(f"{error} The files that it lists are written again.")
            continue
        for file, entry in (manifest.files if manifest else {}).items():
            if keys.get(file) == entry.source and entry.fits(directory / file):
                found[file] = entry
    size = sum(entry.bytes for entry in found.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Checking what is there", disable=not found) as progress:
        return {file: entry for file, entry in found.items() if entry.is_intact(directory / file, progress.update)}


def linkable_files(directory: Path, files: FileSpecs, amp: str) -> dict[str, tuple[Path, FileEntry]]:
    """The files in a directory, if it is a split checkpoint in `amp`, that may stand for those of `files`, by name.

    They have the sizes of the manifest and the tensors of `files`; their hashes are not compared.
    """
    try:
        manifest = read_manifest(directory / MANIFEST_NAME)
    except ValueError:  # it is read like any other checkpoint
        return {}
    if manifest is None or manifest.amp != amp:
        return {}
    found = {}
    for file, entry in manifest.files.items():
        path = directory / file
        try:
            if file in files and entry.fits(path) and not any(header_problems(path, files[file])):
                found[file] = path, entry
        except (OSError, SafetensorError):
            continue
    return found


def header_problems(file: Path, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """What is wrong in the header of a safetensors file: names, shapes and dtypes of its tensors.

    Raises:
        OSError, SafetensorError: if the file cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        found = set(opened.keys())
        for name in sorted(set(specs) - found):
            yield f"{file} lacks {name}: it is not of the model that config.json describes."
        for name in sorted(found - set(specs)):
            yield f"{file} also holds {name}: it is not of the model that config.json describes."
        for name in specs:
            if name not in found:
                continue
            tensor = opened.get_tensor(name)  # a view of the mapped file: nothing is read
            dtype = to_torch(specs[name].dtype)
            if tuple(tensor.shape) != specs[name].shape or tensor.dtype != dtype:
                yield (
                    f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the configuration makes it "
                    f"{dtype} {specs[name].shape}."
                )
