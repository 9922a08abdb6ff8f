"""Writing the split checkpoint: an ordinary Hugging Face checkpoint with one safetensors file for each layer.

A few megabytes of it are in memory at a time. Files are renamed into place when they are whole, and the index, without
which the directory is no checkpoint, is written last. Until then `manifest.UNFINISHED_NAME` has what is done, from
where a run that was ended goes on.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import GenerationConfig, OPTConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_opt import AMP_DTYPES, normalize_dtype
from .config import check_opt, load_config, load_tokenizer, save_config
from .hub import fetch, open_weights
from .layout import INDEX_NAME, TensorSpec, checkpoint_files
from .lock import exclusive
from .manifest import MANIFEST_NAME, UNFINISHED_NAME, FileEntry, Manifest, read_manifest, source_key, write_json
from .source import CheckpointError, WeightSource, open_model
from .stream import file_size, write_tensors
from .verify import header_problems


logger = logging.get_logger(__name__)

# Where in the output shards of the hub are put that are deleted again, and the small files that are being made.
_SHARDS_DIR, _COMPANIONS_DIR = ".source_shards", ".companions"


def save_pretrained_split(
    source: PreTrainedModel | str | os.PathLike,
    directory: str | os.PathLike,
    amp: str | torch.dtype = "f16",
    *,
    delete_source_shards: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Writes OPT weights as a split checkpoint, with attention, MLP, embedding and head in `amp`.

    Layernorms and position embeddings are float32. `OPTForCausalLM.from_pretrained` loads the result. Generation
    config and tokenizer come along, where the source has them. If a run is ended, the next one goes on from there:
    what is there already is checked by its hash, and kept.

    Args:
        source: a loaded `OPTForCausalLM` (not changed), a local directory, or an id on the hub. Of a directory that is
            a split checkpoint in `amp`, the files are hard links where the file system allows.
        directory: where to write; made if it is not there.
        amp: `f16`, `bf16` or `f32`.
        delete_source_shards: keeps no copy of an id's weights: what is not in the cache is fetched to `directory`, one
            file after the other, and deleted when it has been split.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the weights are not those of an OPT model with the source's config.json.
        ValueError: if the source is not an OPT, or `amp` not one of the three.
        OSError: if the source is not there, the disk is full, or another process is writing to `directory`.
    """
    dtype, directory = AMP_DTYPES[normalize_dtype(amp)], Path(directory)
    if isinstance(source, PreTrainedModel):
        config, generation_config = check_opt(source.config, type(source).__name__), source.generation_config
        companions = (lambda _: None) if generation_config is None else generation_config.save_pretrained
        return write_split(open_model(source), config, directory, dtype, companions)
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    config = load_config(source, **hub)
    local = Path(source).is_dir()
    if local and delete_source_shards:
        raise ValueError(f"delete_source_shards is for ids on the hub, and {source} is a directory of yours.")
    if local and directory.exists() and directory.samefile(source):
        raise FileExistsError(f"{directory} is the source itself: choose another output directory.")
    path = fetch(source, force_download=force_download, **hub)
    shards = directory / _SHARDS_DIR if delete_source_shards else None
    weights = open_weights(source, path, scratch=shards, force_download=force_download, **hub)
    written = write_split(weights, config, directory, dtype, partial(save_companions, path, config))
    shutil.rmtree(directory / _SHARDS_DIR, ignore_errors=True)
    return written


def save_companions(source: Path, config: OPTConfig, directory: Path) -> None:
    """Writes what a user of the checkpoint `source` needs beside weights and config.json to `directory`.

    That is the generation config, and the tokenizer, without which there is a warning.
    """
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        generation_config = GenerationConfig.from_model_config(config)
    generation_config.save_pretrained(directory)
    try:
        load_tokenizer(source).save_pretrained(directory)
    except ValueError as error:
        logger.warning(f"{error}, so its copy has none.")


def write_split(
    weights: WeightSource,
    config: OPTConfig,
    directory: Path,
    amp: torch.dtype,
    companions: Callable[[Path], Any] = lambda _: None,
) -> Path:
    """Writes the files of the split form to `directory`, those that are not there already; the directory.

    Args:
        weights: where from.
        config: whose.
        directory: where to.
        amp: see `save_pretrained_split`.
        companions: writes what else there is to be, small files, to the directory that it is given.

    Raises:
        CheckpointError: see `WeightSource`; the directory then has no index, and is no checkpoint.
        OSError: if the disk is full, or another process is writing to the directory.
    """
    weights.check(config)
    files = checkpoint_files(config)
    with exclusive(directory):
        if clash := [f.name for f in directory.glob("*.safetensors") if f.name not in files]:
            raise CheckpointError(f"{directory} already holds {clash[0]}, which is no part of a split checkpoint.")
        keys = {file: source_key(s, normalize_dtype(amp), weights.identity(s)) for file, s in files.items()}
        done = _intact_files(directory, keys)
        prepared = _prepare_companions(directory, config, amp, companions)
        index = _index(files, amp)
        if done.keys() == files.keys() and _is_finished(directory, prepared, index):
            logger.info(f"{directory} is this split checkpoint already, and is left as it is.")
            shutil.rmtree(prepared)
            return directory
        (directory / INDEX_NAME).unlink(missing_ok=True)
        manifest = Manifest(normalize_dtype(amp), done)
        manifest.write(directory / UNFINISHED_NAME)
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        for file in prepared.iterdir():
            os.replace(file, directory / file.name)
        prepared.rmdir()

        _write_files(weights, files, directory, amp, keys, manifest)
        manifest.write(directory / MANIFEST_NAME)
        write_json(directory / INDEX_NAME, index)
        (directory / UNFINISHED_NAME).unlink()
    return directory


def _intact_files(directory: Path, keys: Mapping[str, str]) -> dict[str, FileEntry]:
    """Of the files in a directory, those that need not be written: made from the same, and whole."""
    found: dict[str, FileEntry] = {}
    for name in (MANIFEST_NAME, UNFINISHED_NAME):
        try:
            manifest = read_manifest(directory / name)
        except ValueError as error:
            logger.warning(f"{error} What it tells of is written again.")
            continue
        for file, entry in (manifest.files if manifest else {}).items():
            if keys.get(file) == entry.source and entry.fits(directory / file):
                found[file] = entry
    size = sum(entry.bytes for entry in found.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Checking what is there", disable=not found) as progress:
        return {file: entry for file, entry in found.items() if entry.is_intact(directory / file, progress.update)}


def _prepare_companions(
    directory: Path, config: OPTConfig, amp: torch.dtype, companions: Callable[[Path], Any]
) -> Path:
    """A directory within `directory` with config.json and what else goes beside the weights."""
    prepared = directory / _COMPANIONS_DIR
    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    companions(prepared)
    save_config(config, prepared, amp)
    return prepared


def _index(files: Mapping[str, Mapping[str, TensorSpec]], amp: torch.dtype) -> dict[str, Any]:
    total = sum(file_size(specs, amp) for specs in files.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _is_finished(directory: Path, prepared: Path, index: dict[str, Any]) -> bool:
    """Whether, the weights apart, a directory has all that it should have."""
    try:
        same = json.loads((directory / INDEX_NAME).read_text()) == index
    except (OSError, ValueError):
        return False
    names = [file.name for file in prepared.iterdir()]
    differing = filecmp.cmpfiles(prepared, directory, names, shallow=False)[1:]
    return same and not any(differing) and not (directory / UNFINISHED_NAME).exists()


def _write_files(
    weights: WeightSource,
    files: Mapping[str, dict[str, TensorSpec]],
    directory: Path,
    amp: torch.dtype,
    keys: Mapping[str, str],
    manifest: Manifest,
) -> None:
    """Writes what `manifest` does not have yet, and adds it there."""
    done, syncs = manifest.files, []
    for left in directory.glob("*.safetensors.partial"):
        left.unlink()
    for file in done:
        weights.release(files[file])
    linked = _linkable_files(weights, files, amp)
    missing = sorted(files.keys() - done.keys(), key=lambda file: (weights.last_piece(files[file]), file))
    total = sum(file_size(specs, amp) for specs in files.values())
    _check_space(directory, {file: file_size(files[file], amp) for file in missing if file not in linked})
    initial = total - sum(file_size(files[file], amp) for file in missing)
    with (
        tqdm(total=total, initial=initial, unit="B", unit_scale=True, desc="Splitting") as progress,
        ThreadPoolExecutor(1) as disk,
    ):
        for file in missing:
            specs, new = files[file], directory / f"{file}.partial"
            if file in linked and _link(linked[file][0], new):
                size, digest = linked[file][1].bytes, linked[file][1].sha256
                progress.update(file_size(specs, amp))
            else:
                size, digest = _stream(weights, specs, amp, new, progress.update)
            os.replace(new, directory / file)
            # A file reaches the disk while the next is written.
            syncs.append(disk.submit(_sync, directory / file))
            done[file] = FileEntry(size, digest, keys[file])
            manifest.write(directory / UNFINISHED_NAME, sync=False)
            weights.release(specs)
        progress.set_description("Waiting for the disk")
        for sync in syncs:
            sync.result()
        _sync(directory)
        progress.set_description("Splitting")


def _stream(
    weights: WeightSource, specs: dict[str, TensorSpec], amp: torch.dtype, file: Path, progress: Callable[[int], Any]
) -> tuple[int, str]:
    try:
        return write_tensors(file, specs, amp, lambda name: weights.chunks(name, specs[name], amp), progress)
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"No space is left for {file.parent}: free some and do the same again, it goes on from there",
            ) from error
        raise


def _linkable_files(
    weights: WeightSource, files: Mapping[str, Mapping[str, TensorSpec]], amp: torch.dtype
) -> dict[str, tuple[Path, FileEntry]]:
    """The files of a source that is a split checkpoint in `amp` itself, by their names, where they are sound."""
    if weights.directory is None:
        return {}
    try:
        manifest = read_manifest(weights.directory / MANIFEST_NAME)
    except ValueError:  # then it is read as any other checkpoint
        return {}
    if manifest is None or manifest.amp != normalize_dtype(amp):
        return {}
    found = {}
    for file, entry in manifest.files.items():
        path = weights.directory / file
        try:
            if file in files and entry.fits(path) and not any(header_problems(path, files[file], amp)):
                found[file] = path, entry
        except (OSError, SafetensorError):
            continue
    return found


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _check_space(directory: Path, sizes: Mapping[str, int]) -> None:
    """Raises OSError if the disk has not the room for files of these sizes, in bytes, some of which may be there."""
    replaced = sum((directory / file).stat().st_size for file in sizes if (directory / file).is_file())
    needed, free = sum(sizes.values()), shutil.disk_usage(directory).free + replaced
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{directory} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: free some, or "
            "choose another directory",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
