"""Writing the split checkpoint: an ordinary Hugging Face checkpoint with one safetensors file for each layer.

A few megabytes of it are in memory at a time. Files are renamed into place when they are complete. The index is
written last: without it the directory is no checkpoint. Until then `manifest.UNFINISHED_NAME` lists what is done, so
that the next run continues from there.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import OPTConfig, PreTrainedModel
from transformers.utils import logging

from ..dtypes import normalize_dtype
from ..hardware import in_units
from .config import check_opt, load_config, save_companions, save_config
from .hub import open_checkpoint
from .layout import INDEX_NAME, TensorSpec, checkpoint_files
from .manifest import MANIFEST_NAME, UNFINISHED_NAME, FileEntry, Manifest, read_manifest, source_key, write_json
from .source import CheckpointError, WeightSource, open_model
from .stream import file_size, write_tensors
from .verify import header_problems


logger = logging.get_logger(__name__)

# How long to try for a lock. WeakFileLock tries several times in this time; with 0 it would not try at all.
_LOCK_SECONDS = 0.2
# The errors of file systems without locks, and of a parent directory that cannot be written.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EROFS)

# Directories in the output: shards from the hub that are deleted later, and small files that are being written.
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

    Layernorms and position embeddings are float32. `OPTForCausalLM.from_pretrained` loads the result. The
    generation config and the tokenizer are written too, where the source has them. After an interruption, the next
    run continues: files that are there already are checked by their hashes, and kept.

    Args:
        source: a loaded `OPTForCausalLM` (not changed), a local directory, or an id on the hub. If it is a
            directory with a split checkpoint in `amp`, the files are linked where the file system allows.
        directory: where to write; created if it does not exist.
        amp: `f16`, `bf16` or `f32`.
        delete_source_shards: keeps no copy of the weights of an id on the hub: a file that is not in the cache is
            fetched to `directory`, and deleted when it has been split.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the weights are not those of an OPT model with the source's config.json.
        ValueError: if the source is not an OPT, or `amp` not one of the three.
        OSError: if the source does not exist, the disk is full, or another process is writing to `directory`.
    """
    amp, directory = normalize_dtype(amp), Path(directory)
    if isinstance(source, PreTrainedModel):
        check_opt(source.config, type(source).__name__)
        generation_config = source.generation_config
        companions = (lambda _: None) if generation_config is None else generation_config.save_pretrained
        return write_split(open_model(source), directory, amp, companions)
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
    checkpoint = open_checkpoint(source, config, scratch=shards, force_download=force_download, **hub)
    companions = partial(save_companions, checkpoint.directory, config)
    written = write_split(checkpoint.weights, directory, amp, companions)
    shutil.rmtree(directory / _SHARDS_DIR, ignore_errors=True)
    return written


def write_split(
    weights: WeightSource,
    directory: Path,
    amp: str,
    companions: Callable[[Path], Any] = lambda _: None,
) -> Path:
    """Writes the files of the split format that are missing in `directory`; returns the directory.

    Args:
        weights: the source.
        directory: where to write.
        amp: `f16`, `bf16` or `f32`.
        companions: writes the small files, except config.json, to the directory that it is called with.

    Raises:
        CheckpointError: if a tensor cannot be read (see `WeightSource.chunks`), or the directory holds foreign files.
            A directory without an index is no checkpoint.
        OSError: if the disk is full, or another process is writing to the directory.
    """
    files = checkpoint_files(weights.config, amp)
    directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory):
        if clash := [f.name for f in directory.glob("*.safetensors") if f.name not in files]:
            raise CheckpointError(f"{directory} already holds {clash[0]}, which is foreign to a split checkpoint.")
        keys = {file: source_key(s, weights.identity(s)) for file, s in files.items()}
        done = _intact_files(directory, keys)
        prepared = _prepare_companions(directory, weights.config, amp, companions)
        index = _index(files)
        if done.keys() == files.keys() and _is_finished(directory, prepared, index):
            logger.info(f"{directory} is this split checkpoint already: nothing is written.")
            shutil.rmtree(prepared)
            return directory
        (directory / INDEX_NAME).unlink(missing_ok=True)
        manifest = Manifest(amp, done)
        manifest.write(directory / UNFINISHED_NAME)
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        for file in prepared.iterdir():
            os.replace(file, directory / file.name)
        prepared.rmdir()

        _write_files(weights, files, directory, keys, manifest)
        manifest.write(directory / MANIFEST_NAME)
        write_json(directory / INDEX_NAME, index)
        (directory / UNFINISHED_NAME).unlink()
    return directory


def _intact_files(directory: Path, keys: Mapping[str, str]) -> dict[str, FileEntry]:
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


def _prepare_companions(directory: Path, config: OPTConfig, amp: str, companions: Callable[[Path], Any]) -> Path:
    """A directory within `directory` with config.json and the other small files."""
    prepared = directory / _COMPANIONS_DIR
    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    companions(prepared)
    save_config(config, prepared, amp)
    return prepared


def _index(files: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Any]:
    total = sum(file_size(specs) for specs in files.values())
    weight_map = {name: file for file, specs in files.items() for name in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _is_finished(directory: Path, prepared: Path, index: dict[str, Any]) -> bool:
    """Whether a directory has the index and the small files that it should have."""
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
    keys: Mapping[str, str],
    manifest: Manifest,
) -> None:
    """Writes the files that `manifest` does not have yet, and adds them to it."""
    done, syncs = manifest.files, []
    for left in directory.glob("*.safetensors.partial"):
        left.unlink()
    for file in done:
        weights.release(files[file])
    linked = _linkable_files(weights, files, manifest.amp)
    missing = sorted(files.keys() - done.keys(), key=lambda file: (weights.last_piece(files[file]), file))
    total = sum(file_size(specs) for specs in files.values())
    _check_space(directory, {file: file_size(files[file]) for file in missing if file not in linked})
    initial = total - sum(file_size(files[file]) for file in missing)
    with (
        tqdm(total=total, initial=initial, unit="B", unit_scale=True, desc="Splitting") as progress,
        ThreadPoolExecutor(1) as disk,
    ):
        for file in missing:
            specs, new = files[file], directory / f"{file}.partial"
            if file in linked and _link(linked[file][0], new):
                size, digest = linked[file][1].bytes, linked[file][1].sha256
                progress.update(file_size(specs))
            else:
                size, digest = _stream(weights, specs, new, progress.update)
            os.replace(new, directory / file)
            # A file is flushed to the disk while the next is written.
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
    weights: WeightSource, specs: dict[str, TensorSpec], file: Path, progress: Callable[[int], Any]
) -> tuple[int, str]:
    try:
        return write_tensors(file, specs, lambda name: weights.chunks(name, specs[name]), progress)
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"No space is left for {file.parent}: free some and run this again: it continues where it stopped",
            ) from error
        raise


def _linkable_files(
    weights: WeightSource, files: Mapping[str, Mapping[str, TensorSpec]], amp: str
) -> dict[str, tuple[Path, FileEntry]]:
    """The sound files of a source that is itself a split checkpoint in `amp`, by their names."""
    if weights.directory is None:
        return {}
    try:
        manifest = read_manifest(weights.directory / MANIFEST_NAME)
    except ValueError:  # it is read like any other checkpoint
        return {}
    if manifest is None or manifest.amp != amp:
        return {}
    found = {}
    for file, entry in manifest.files.items():
        path = weights.directory / file
        try:
            if file in files and entry.fits(path) and not any(header_problems(path, files[file])):
                found[file] = path, entry
        except (OSError, SafetensorError):
            continue
    return found


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Keeps other threads and processes from writing `directory`, by a lock file next to it.

    The lock ends with its process, even if that is killed. There is no lock where the file system has none, or where
    the parent directory cannot be written.

    Raises:
        BlockingIOError: at once, if another one is writing it.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_name(f".{directory.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(file, timeout=_LOCK_SECONDS))
            # Removed while it is locked: another writer that had opened it notices, and creates a new one.
            held.callback(file.unlink, missing_ok=True)
        except Timeout:
            raise BlockingIOError(
                f"{directory} is being written by another process or thread: wait for it to end, or choose another "
                "directory."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


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
