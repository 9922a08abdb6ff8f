"""Verifying an export or a split checkpoint: whether every file is what was written, and no other file is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import OPTConfig

from ..dtypes import normalize_dtype
from ..host_framework import NEURON_CONFIG_NAME
from .config import load_config
from .layout import CHECKPOINT_DIR, INDEX_NAME, CheckpointError, FileSpecs, TensorSpec, checkpoint_files
from .listing import EXPORT_MANIFEST_NAME, Listed, differences, read_export_manifest, visible_files
from .manifest import MANIFEST_NAME, UNFINISHED_NAME, FileEntry, Manifest, header_problems, read_manifest
from .quantization import is_int8
from .stream import Progress


def verify_checkpoint(directory: str | os.PathLike) -> None:
    """Reads an export or a split checkpoint, and compares every file with its manifest.

    What an earlier version wrote without a hash is not compared; see `find_unlisted`.

    Raises:
        CheckpointError: naming each file that is missing, is not what was written, or does not belong.
    """
    if problems := find_problems(Path(directory)):
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"{directory} is not what was written:\n{listed}")


def find_problems(directory: Path, contents: bool = True) -> list[str]:
    """What is wrong with an export or a split checkpoint: a sentence for each problem.

    Args:
        directory: the checkpoint or export.
        contents: whether to read the files, compare their hashes, and name files that do not belong. Without, only
            names, sizes, shapes and dtypes are compared.
    """
    if not directory.is_dir():
        return [f"{directory} is not a directory: give a split checkpoint, or an export."]
    checkpoint = directory / CHECKPOINT_DIR if _is_export(directory) else directory
    try:
        listed, manifest = _read_manifests(directory, checkpoint)
    except ValueError as error:
        return [str(error)]
    if listed is not None and (wrong := list(_listed_problems(directory, listed, contents))):
        return wrong
    try:
        config = load_config(checkpoint)
        amp = normalize_dtype(config.dtype or "f32" if manifest is None else manifest.amp)
    except (OSError, ValueError) as error:
        return [str(error)]
    # The hashes of files that are listed were compared above.
    return list(_checkpoint_problems(checkpoint, config, amp, manifest, contents and listed is None))


def find_unlisted(directory: Path) -> list[str]:
    """The files of an export or split checkpoint of an earlier version for which no hash was recorded."""
    checkpoint = directory / CHECKPOINT_DIR if _is_export(directory) else directory
    listed, manifest = _read_manifests(directory, checkpoint)
    if listed is not None or manifest is None:
        return []
    known = {(checkpoint / name).relative_to(directory).as_posix() for name in (*manifest.files, MANIFEST_NAME)}
    return [name for name in visible_files(directory) if name not in known]


def _is_export(directory: Path) -> bool:
    """Whether a directory is an export, perhaps an incomplete one."""
    marks = (NEURON_CONFIG_NAME, EXPORT_MANIFEST_NAME)
    if any((directory / name).is_file() for name in marks):
        return True
    return (directory / CHECKPOINT_DIR).is_dir() and not (directory / INDEX_NAME).is_file()


def _read_manifests(directory: Path, checkpoint: Path) -> tuple[dict[str, Listed] | None, Manifest | None]:
    """The list of all files, None if an earlier version wrote none; and the manifest of the checkpoint.

    Raises:
        ValueError: if a manifest is broken, or missing although it was written.
    """
    if directory == checkpoint:
        manifest = read_manifest(checkpoint / MANIFEST_NAME)
        listed = None if manifest is None or manifest.others is None else {**manifest.files, **manifest.others}
        return listed, manifest
    listed = read_export_manifest(directory)
    try:
        manifest = read_manifest(checkpoint / MANIFEST_NAME)
    except ValueError:
        if listed is None:
            raise
        manifest = None  # it is listed
    if listed is None and manifest is not None and manifest.others is not None:
        raise ValueError(
            f"{directory / EXPORT_MANIFEST_NAME} is missing: without its hashes, the files cannot be compared with "
            f"what was written. Export the model again, from {checkpoint} for example."
        )
    return listed, manifest


def _listed_problems(directory: Path, listed: Mapping[str, Listed], contents: bool) -> Iterator[str]:
    size = sum(entry.bytes for entry in listed.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Verifying", disable=not contents) as progress:
        yield from differences(directory, listed, contents, progress.update)
    if contents:
        manifest = EXPORT_MANIFEST_NAME if _is_export(directory) else MANIFEST_NAME
        for name, file in visible_files(directory).items():
            # A run that is killed at its very end leaves the last of these.
            if name not in listed and name not in (manifest, UNFINISHED_NAME):
                yield f"{file} is no part of what was written: remove it, or keep it elsewhere."


def _checkpoint_problems(
    directory: Path, config: OPTConfig, amp: str, manifest: Manifest | None, contents: bool
) -> Iterator[str]:
    files = checkpoint_files(config, amp, "int8" if is_int8(config) else None)
    if manifest is None:
        yield (
            f"{directory / MANIFEST_NAME} is missing: without its hashes, the files cannot be compared with what "
            "was written. Split the model again."
        )
    yield from _index_problems(directory / INDEX_NAME, files)
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in files:
            yield f"{path} is no part of the checkpoint that {directory / 'config.json'} describes."
    size = sum((directory / file).stat().st_size for file in files if (directory / file).is_file())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Verifying", disable=not contents) as progress:
        for file, specs in files.items():
            entry = None if manifest is None else manifest.files.get(file)
            yield from _file_problems(directory / file, specs, entry, contents, progress.update)


def _index_problems(index: Path, files: FileSpecs) -> Iterator[str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
    except FileNotFoundError:
        yield f"{index} is missing: the checkpoint is incomplete."
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{index} is broken ({error!r})."
        return
    if found != {name: file for file, specs in files.items() for name in specs}:
        yield f"{index} does not name the tensors and files of the model that config.json describes."


def _file_problems(
    file: Path,
    specs: Mapping[str, TensorSpec],
    entry: FileEntry | None,
    contents: bool,
    progress: Progress,
) -> Iterator[str]:
    listed = {} if entry is None else {file.name: entry}
    if not file.is_file():
        yield f"{file} is missing."
        return
    if wrong := list(differences(file.parent, listed, False)):
        yield from wrong
        return
    try:
        wrong = list(header_problems(file, specs))
    except (OSError, SafetensorError) as error:
        yield f"{file} is truncated or broken ({error})."
        return
    yield from wrong
    if not contents:
        return
    yield from differences(file.parent, listed, True, progress)
    if not wrong:
        with safe_open(file, framework="pt") as opened:
            for name in specs:
                if not torch.isfinite(torch.stack(torch.aminmax(opened.get_tensor(name)))).all():
                    yield f"{file}: {name} has values that are not finite."
