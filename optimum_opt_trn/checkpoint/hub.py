"""Opening a checkpoint, local or on the Hugging Face Hub, and publishing one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from ..host_framework import NEURON_CONFIG_NAME
from .adapter import Adapter, open_adapters
from .formats import Files, LocalFiles, find_pieces
from .layout import CHECKPOINT_DIR, CheckpointError, FileSpecs
from .source import WeightSource
from .verify import find_problems


# The files of a repository that are needed besides the weights: configurations, indices, tokenizer.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to read.

    Args:
        directory: a local directory with its small files: the source itself, or its snapshot in the cache.
        weights: its weights, checked against what the model consists of.
    """

    directory: Path
    weights: WeightSource


def open_checkpoint(
    source: str | os.PathLike,
    specs: FileSpecs,
    *,
    adapter: Sequence[str] = (),
    scratch: Path | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Checkpoint:
    """Opens a checkpoint: a local directory, or an id on the hub, whose files of weights are fetched when needed.

    Args:
        source: a local directory or an id on the hub. The weights of an export are those in its `checkpoint/`.
        specs: what the model consists of (`layout.checkpoint_files`), in the dtypes to read it in.
        adapter: LoRA adapters that are merged into the weights, see `open_adapters`.
        scratch: where to put files of weights that are not in the cache. They are deleted as soon as they are not
            needed any more. None keeps them in the cache.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.

    Raises:
        CheckpointError: if there are no weights, or they are not those of the model, or a file is broken.
        OSError: if there is no such directory and no such id, or a file cannot be fetched.
    """
    hub: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    local = Path(source).is_dir()
    directory = Path(source) if local else _fetch_small_files(str(source), revision, hub)
    subfolder = CHECKPOINT_DIR if (directory / NEURON_CONFIG_NAME).is_file() else ""
    files: Files = LocalFiles(directory / subfolder)
    if not local:
        files = _HubFiles(str(source), directory, subfolder, scratch, hub)
    return Checkpoint(directory, open_files(files, specs, open_adapters(adapter, specs, **hub)))


def open_files(files: Files, specs: FileSpecs, adapters: Sequence[Adapter] = ()) -> WeightSource:
    """The weights in the files of a checkpoint; see `open_checkpoint`."""
    return WeightSource(find_pieces(files), files.origin, specs, files.directory, adapters)


def _fetch_small_files(source: str, revision: str | None, hub: dict[str, Any]) -> Path:
    """The local directory of the id `source` in the cache, with its small files."""
    try:
        return Path(snapshot_download(source, allow_patterns=_SMALL_FILES, revision=revision, **hub))
    except (HFValidationError, OSError) as error:
        raise OSError(f"{source} is not a local directory, and cannot be fetched from the hub: {error}") from error


class _HubFiles:
    """The files of a commit on the hub, whose directory in the cache is `snapshot`; see `Files`."""

    def __init__(self, repository: str, snapshot: Path, subfolder: str, scratch: Path | None, hub: dict[str, Any]):
        self.origin = repository
        self.directory: Path | None = None
        self._snapshot, self._subfolder, self._scratch, self._hub = snapshot, subfolder, scratch, hub
        self._found: dict[str, Path] = {}

    def find(self, name: str) -> Path | None:
        name = f"{self._subfolder}/{name}" if self._subfolder else name
        if name.endswith(".json"):  # what was not fetched as a small file is not there
            return self._snapshot / name if (self._snapshot / name).is_file() else None
        if name not in self._found:
            try:
                self._found[name] = self._download(name)
            except LocalEntryNotFoundError as error:
                if self._hub.get("local_files_only"):
                    return None
                raise OSError(f"{name} of {self.origin} cannot be fetched: {error}") from error
            except EntryNotFoundError:
                return None
        return self._found[name]

    def _download(self, name: str) -> Path:
        options = dict(self._hub)
        if self._scratch is not None and not options.get("force_download"):
            cached = try_to_load_from_cache(
                self.origin, name, cache_dir=options.get("cache_dir"), revision=self._snapshot.name
            )
            if isinstance(cached, str):
                return Path(cached)
        if self._scratch is not None:
            options.pop("cache_dir", None)
            options["local_dir"] = self._scratch
        return Path(hf_hub_download(self.origin, name, revision=self._snapshot.name, **options))

    def identity(self, name: str) -> str:
        return f"{self.origin} {self._snapshot.name} {self._subfolder} {name}"

    def discard(self, name: str) -> None:
        name = f"{self._subfolder}/{name}" if self._subfolder else name
        file = self._found.pop(name, None)
        if self._scratch is not None and file is not None and file.is_relative_to(self._scratch):
            file.unlink()


def push_to_hub(
    directory: str | os.PathLike,
    repository_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads an export, or a split checkpoint, in one commit; returns the address of the commit.

    With one commit, the repository never holds a part of it. After an interruption, files that were uploaded are not
    uploaded again: the hub knows them by their hashes.

    Args:
        directory: what to upload.
        repository_id: `user/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: the branch, by default the main one; created if it does not exist.
        token, endpoint: as in huggingface_hub.

    Raises:
        CheckpointError: if a file is missing, or has another size than the manifest says.
    """
    directory = Path(directory)
    if problems := find_problems(directory, contents=False):
        raise CheckpointError(f"{directory} is not uploaded, since it is incomplete. {problems[0]}")
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repository_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository_id,
        folder_path=directory,
        revision=revision,
        commit_message="Upload an OPT export of optimum_opt_trn",
        ignore_patterns=[".*", "*/.*", "*.partial"],
    )
    return commit.commit_url
