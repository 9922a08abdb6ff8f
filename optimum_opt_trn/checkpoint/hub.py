"""Checkpoints on the Hugging Face Hub: fetched file by file, and published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from .source import CheckpointError, WeightSource, open_directory, open_files
from .verify import find_problems


# What is needed of a repository besides weights: configurations, indices, tokenizer.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


def fetch(
    source: str | os.PathLike,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local directory of a checkpoint: `source` itself, or a download of that id's files, its weights left out.

    Raises:
        OSError: if there is no such directory and no such id.
    """
    path = Path(source)
    if path.is_dir():
        return path
    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=_SMALL_FILES,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        )
    except (HFValidationError, OSError) as error:
        raise OSError(f"{source} is no local directory, and cannot be had from the hub: {error}") from error


def open_weights(
    source: str | os.PathLike,
    path: Path,
    subfolder: str = "",
    scratch: Path | None = None,
    **hub: Any,
) -> WeightSource:
    """The weights of a checkpoint. Those of an id on the hub are fetched file by file, when they are needed.

    Args:
        source: a local directory, or an id on the hub.
        path: what `fetch` returned for it.
        subfolder: where in it the weights are.
        scratch: where to put files of weights that are not in the cache, which are then deleted as soon as they are
            not needed any more; None to keep them in the cache.
        hub: token, cache_dir, force_download, local_files_only, as in transformers.

    Raises:
        CheckpointError: see `open_directory`.
        OSError: if a file cannot be fetched.
    """
    if Path(source).is_dir():
        return open_directory(path / subfolder)
    return open_files(_HubFiles(str(source), path, subfolder, scratch, hub), lazily=True)


class _HubFiles:
    """The files of a commit on the hub, of which `snapshot` is the directory in the cache; see `Files`."""

    def __init__(self, repository: str, snapshot: Path, subfolder: str, scratch: Path | None, hub: dict[str, Any]):
        self.origin = repository
        self._snapshot, self._subfolder, self._scratch, self._hub = snapshot, subfolder, scratch, hub
        self._found: dict[str, Path] = {}

    def find(self, name: str) -> Path | None:
        name = f"{self._subfolder}/{name}" if self._subfolder else name
        if name.endswith(".json"):  # what `fetch` did not bring is not there
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
        options = {name: value for name, value in self._hub.items() if name != "revision"}
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
    """Uploads an export, or a split checkpoint, in one commit; the address of the commit.

    It is one commit so that the repository is never half of it. After an interruption, files that were uploaded are
    not uploaded again: the hub knows them by their hashes.

    Args:
        directory: what to upload.
        repository_id: where to, `user/name`; made if it is not there.
        private: whether a new repository is.
        revision: the branch, by default the main one; made if it is not there.
        token, endpoint: as in huggingface_hub.

    Raises:
        CheckpointError: if the directory lacks something, or a file has not the size that the manifest says.
    """
    directory = Path(directory)
    if problems := find_problems(directory, contents=False):
        raise CheckpointError(f"{directory} is not uploaded, since it is not whole. {problems[0]}")
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
