"""Verifying a split checkpoint, or the one in an export: whether every file is what was written."""

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
from .config import load_config
from .layout import CHECKPOINT_DIR, INDEX_NAME, CheckpointError, FileSpecs, TensorSpec, checkpoint_files
from .manifest import MANIFEST_NAME, FileEntry, Manifest, header_problems, read_manifest
from .stream import Progress


def verify_checkpoint(directory: str | os.PathLike) -> None:
    """Reads a split checkpoint, or the one in an export, and compares it with its manifest.

    Raises:
        CheckpointError: naming each file that is missing, is not what was written, or does not belong.
    """
    if problems := find_problems(Path(directory)):
        raise CheckpointError(f"{directory} is incomplete:\n" + "\n".join(f"- {problem}" for problem in problems))


def find_problems(directory: Path, contents: bool = True) -> list[str]:
    """What is wrong with a split checkpoint, or with the one in an export: a sentence for each problem.

    Args:
        directory: the checkpoint or export.
        contents: whether to read the files and compare their hashes. Without, only names, sizes, shapes and dtypes
            are compared.
    """
    if not directory.is_dir():
        return [f"{directory} is not a directory: give a split checkpoint, or an export."]
    if not (directory / INDEX_NAME).is_file() and (directory / CHECKPOINT_DIR).is_dir():
        directory = directory / CHECKPOINT_DIR
    try:
        config = load_config(directory)
        manifest = read_manifest(directory / MANIFEST_NAME)
        amp = normalize_dtype(config.dtype or "f32" if manifest is None else manifest.amp)
    except (OSError, ValueError) as error:
        return [str(error)]
    return list(_problems(directory, config, amp, manifest, contents))


def _problems(
    directory: Path, config: OPTConfig, amp: str, manifest: Manifest | None, contents: bool
) -> Iterator[str]:
    files = checkpoint_files(config, amp)
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
    if not file.is_file():
        yield f"{file} is missing."
        return
    if entry is not None and not entry.fits(file):
        yield f"{file} has {file.stat().st_size} bytes, and was written with {entry.bytes}: it is cut off or replaced."
        return
    try:
        wrong = list(header_problems(file, specs))
    except (OSError, SafetensorError) as error:
        yield f"{file} is truncated or broken ({error})."
        return
    yield from wrong
    if not contents:
        return
    if entry is not None and not entry.is_intact(file, progress):
        yield f"{file} has changed since it was written: its SHA-256 is not the one in the manifest."
    if not wrong:
        with safe_open(file, framework="pt") as opened:
            for name in specs:
                if not torch.isfinite(torch.stack(torch.aminmax(opened.get_tensor(name)))).all():
                    yield f"{file}: {name} has values that are not finite."
