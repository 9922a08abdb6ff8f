"""Writing the split checkpoint: an ordinary Hugging Face checkpoint with one safetensors file for each layer.

A few megabytes of it are in memory at a time. Files are renamed into place when they are complete. The index is
written last: without it the directory is no checkpoint. Until then `manifest.UNFINISHED_NAME` lists what is done, so
that the next run continues from there.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_opt import normalize_adapters
from ..dtypes import normalize_dtype, normalize_weight_dtype
from ..hardware import in_units
from .adapter import open_adapters
from .config import check_opt, load_config
from .hub import open_checkpoint
from .layout import INDEX_NAME, CheckpointError, FileSpecs, checkpoint_files
from .listing import Listed, json_text, list_file, list_text, visible_files, write_json
from .lock import one_writer
from .manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    FileEntry,
    Manifest,
    intact_files,
    linkable_files,
    read_manifest,
)
from .small_files import save_config, save_small_files
from .source import WeightSource, open_model
from .stream import write_tensors


logger = logging.get_logger(__name__)

# Directories in the output: shards from the hub that are deleted later, and small files that are being written.
_SHARDS_DIR, _SMALL_FILES_DIR = ".source_shards", ".companions"


def save_pretrained_split(
    source: PreTrainedModel | str | os.PathLike,
    directory: str | os.PathLike,
    amp: str | torch.dtype = "f16",
    *,
    weight_dtype: str | None = None,
    adapter: Any = (),
    delete_source_shards: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Writes OPT weights as a split checkpoint, with attention, MLP, embedding and head in `amp`.

    Layernorms and position embeddings are float32. `OPTForCausalLM.from_pretrained` loads the result. The
    generation config and the tokenizer are written too, where the source has them. After an interruption, the next
    run continues: files that are there already are checked by their hashes, and kept.

    Args:
        source: a loaded `OPTForCausalLM` (not changed), a local directory, or an id on the hub. If it is a
            directory with a split checkpoint in `amp`, the files are linked where the file system allows.
        directory: where to write; created if it does not exist.
        amp: `f16`, `bf16` or `f32`.
        weight_dtype: `int8` for the matrices of attention and MLP and the head, each output channel with a float32
            scale (quantization.py); by default `amp`.
        adapter: LoRA adapters of PEFT to merge into the weights, in float32 before they are cast: a directory or an id
            on the hub, a list of them, or a dictionary with the weight of each.
        delete_source_shards: keeps no copy of the weights of an id on the hub: a file that is not in the cache is
            fetched to `directory`, and deleted when it has been split.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the weights are not those of an OPT model with the source's config.json, or an adapter
            cannot be merged.
        ValueError: if the source is not an OPT, or `amp` not one of the three.
        OSError: if the source does not exist, the disk is full, or another process is writing to `directory`.
    """
    amp, directory, adapter = normalize_dtype(amp), Path(directory), normalize_adapters(adapter)
    weight_dtype = normalize_weight_dtype(weight_dtype, amp)
    if isinstance(source, PreTrainedModel):
        config = check_opt(source.config, type(source).__name__)
        files = checkpoint_files(config, amp, weight_dtype)
        where = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        weights = open_model(source, files, open_adapters(adapter, files, **where))
        return write_split(weights, directory, amp, partial(_save_small_files_of, source, amp, weight_dtype))
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    config = load_config(source, **hub)
    local = Path(source).is_dir()
    if local and delete_source_shards:
        raise ValueError(f"delete_source_shards is for ids on the hub, and {source} is a local directory.")
    if local and directory.exists() and directory.samefile(source):
        raise FileExistsError(f"{directory} is the source itself: choose another output directory.")
    shards = directory / _SHARDS_DIR if delete_source_shards else None
    files = checkpoint_files(config, amp, weight_dtype)
    checkpoint = open_checkpoint(source, files, adapter=adapter, scratch=shards, force_download=force_download, **hub)
    write_small_files = partial(save_small_files, checkpoint.directory, config, amp, weight_dtype=weight_dtype)
    written = write_split(checkpoint.weights, directory, amp, write_small_files)
    shutil.rmtree(directory / _SHARDS_DIR, ignore_errors=True)
    return written


def _save_small_files_of(model: PreTrainedModel, amp: str, weight_dtype: str | None, directory: Path) -> None:
    save_config(model.config, amp, directory, weight_dtype)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def write_split(weights: WeightSource, directory: Path, amp: str, write_small_files: Callable[[Path], Any]) -> Path:
    """Writes the files of the split format that are missing in `directory`; returns the directory.

    Args:
        weights: the source, whose `files` are written.
        directory: where to write.
        amp: `f16`, `bf16` or `f32`, for which `weights` was opened.
        write_small_files: writes config.json, and what goes with it, to the directory that it is called with.

    Raises:
        CheckpointError: if a tensor cannot be read (see `WeightSource.chunks`), or the directory holds foreign files.
            A directory without an index is no checkpoint.
        OSError: if the disk is full, or another process is writing to the directory.
    """
    files, index = weights.files, _index(weights.files)
    directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory):
        if clash := [f.name for f in directory.glob("*.safetensors") if f.name not in files]:
            raise CheckpointError(f"{directory} already holds {clash[0]}, which is foreign to a split checkpoint.")
        unmerged = {file: specs for file, specs in files.items() if not weights.is_merged(file)}
        keys = {file: weights.key(file) for file in files}
        manifest = Manifest(amp, intact_files(directory, keys))
        linkable = linkable_files(weights.directory, unmerged, amp) if weights.directory else {}
        prepared = directory / _SMALL_FILES_DIR
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir()
        write_small_files(prepared)
        others = {name: list_file(path) for name, path in visible_files(prepared).items()}
        others[INDEX_NAME] = list_text(json_text(index))
        if manifest.files.keys() == files.keys() and _is_finished(directory, others):
            logger.info(f"{directory} is this split checkpoint already: nothing is written.")
            shutil.rmtree(prepared)
            return directory
        (directory / INDEX_NAME).unlink(missing_ok=True)
        for name in _listed_others(directory).keys() - others.keys():
            (directory / name).unlink(missing_ok=True)  # the tokenizer of another model, for example
        manifest.write(directory / UNFINISHED_NAME)
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        for path in prepared.iterdir():
            os.replace(path, directory / path.name)
        prepared.rmdir()

        _write_files(weights, directory, keys, linkable, manifest)
        replace(manifest, others=others).write(directory / MANIFEST_NAME)
        write_json(directory / INDEX_NAME, index)
        (directory / UNFINISHED_NAME).unlink()
    return directory


def _index(files: FileSpecs) -> dict[str, Any]:
    total = sum(spec.bytes for specs in files.values() for spec in specs.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _is_finished(directory: Path, others: Mapping[str, Listed]) -> bool:
    """Whether a directory has the index and the small files that it should have, and lists them."""
    if _listed_others(directory) != others or (directory / UNFINISHED_NAME).exists():
        return False
    return all(entry.is_intact(directory / name) for name, entry in others.items())


def _listed_others(directory: Path) -> dict[str, Listed]:
    """The files besides the weights that the manifest of a directory lists."""
    try:
        manifest = read_manifest(directory / MANIFEST_NAME)
    except ValueError:
        return {}
    return (manifest.others if manifest else None) or {}


def _write_files(
    weights: WeightSource,
    directory: Path,
    keys: Mapping[str, str],
    linkable: Mapping[str, tuple[Path, FileEntry]],
    manifest: Manifest,
) -> None:
    """Writes the files that `manifest` does not have yet, and adds them to it."""
    done, syncs = manifest.files, []
    for left in directory.glob("*.safetensors.partial"):
        left.unlink()
    sizes = {file: sum(spec.bytes for spec in specs.values()) for file, specs in weights.files.items()}
    missing = sizes.keys() - done.keys()
    _check_space(directory, {file: sizes[file] for file in missing - linkable.keys()})
    initial = sum(sizes[file] for file in done)
    with (
        tqdm(total=sum(sizes.values()), initial=initial, unit="B", unit_scale=True, desc="Splitting") as progress,
        ThreadPoolExecutor(1) as disk,
    ):
        for file in weights.in_order(missing):
            new = directory / f"{file}.partial"
            if file in linkable and _link(linkable[file][0], new):
                size, digest = linkable[file][1].bytes, linkable[file][1].sha256
                progress.update(sizes[file])
            else:
                size, digest = _stream(weights, file, new, progress.update)
            os.replace(new, directory / file)
            # A file is flushed to the disk while the next is written.
            syncs.append(disk.submit(_sync, directory / file))
            done[file] = FileEntry(size, digest, keys[file])
            manifest.write(directory / UNFINISHED_NAME, sync=False)
        progress.set_description("Waiting for the disk")
        for sync in syncs:
            sync.result()
        _sync(directory)
        progress.set_description("Splitting")


def _stream(weights: WeightSource, file: str, path: Path, progress: Callable[[int], Any]) -> tuple[int, str]:
    try:
        return write_tensors(path, weights.files[file], weights.chunks, progress)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"No space is left for {path.parent}: free some and run this again: it continues where it stopped",
            ) from error
        raise


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _check_space(directory: Path, sizes: Mapping[str, int]) -> None:
    """Raises OSError if files of these sizes, in bytes, do not fit the disk. Files that are there are replaced."""
    replaced = sum((directory / file).stat().st_size for file in sizes if (directory / file).is_file())
    needed, free = sum(sizes.values()), shutil.disk_usage(directory).free + replaced
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{directory} needs {in_units(needed)}, and its disk has {in_units(free)} free: free some, or choose "
            "another directory",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
