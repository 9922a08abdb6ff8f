"""Export: a checkpoint becomes a split checkpoint, compiled artifacts and configurations, in one directory."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from .checkpoint.config import check_opt, load_config, save_config
from .checkpoint.hub import fetch, open_weights
from .checkpoint.lock import exclusive
from .checkpoint.split import save_companions, write_split
from .configuration_opt import OPTNeuronConfig
from .host_framework import NEURON_CONFIG_NAME
from .planning.fit import check_fit
from .targets import get_target
from .targets.base import CHECKPOINT_DIR


def export_opt(
    source: str | os.PathLike,
    output: str | os.PathLike,
    neuron_config: OPTNeuronConfig,
    *,
    config: PretrainedConfig | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    eager: bool = False,
    force: bool = False,
) -> Path:
    """Exports an OPT checkpoint.

    `output` gets config.json, generation_config.json, neuron_config.json, the tokenizer, `checkpoint/` (an ordinary
    Hugging Face checkpoint, one file a layer) and `compiled/`. It is written beside and renamed when it is whole: an
    interrupted export leaves what was there before. Of a source that is a split checkpoint in the same amp, or an
    export with one, the files are hard links where the file system allows.

    Args:
        source: a local directory or an id on the hub; an export is exported anew from its `checkpoint/`.
        output: a directory that is not there, is empty, or holds an earlier export, which is replaced.
        neuron_config: what to export for.
        config: the model's configuration, if it is at hand.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.
        eager: skips compilation; the export runs eagerly.
        force: goes on with an export that does not fit the device's memory.

    Returns:
        The output directory.

    Raises:
        ValueError: if the source is not an OPT, or does not fit `neuron_config`; DoesNotFitError if `neuron_config`
            needs more memory than there is; CheckpointError if its weights do not fit its config.json.
        FileExistsError: if `output` holds anything but an export.
        OSError: if the source is not there, the disk is full, or another process is writing this output.
        RuntimeError: if the target is not to be had on this host.
    """
    output = Path(output)
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    opt_config = load_config(source, **hub) if config is None else check_opt(config, source)
    neuron_config.check_model(opt_config)
    check_fit(opt_config, neuron_config, force)
    target = get_target(neuron_config)
    _check_output(output, source)

    path = fetch(source, **hub)
    with _staged(output) as staging:
        weights = open_weights(source, path, CHECKPOINT_DIR if _is_export(path) else "", **hub)
        weights.check(opt_config)  # before a compiler starts, which an error would wait for
        with ThreadPoolExecutor(1) as beside:
            beside.submit(target.prepare, eager)
            write_split(weights, opt_config, staging / CHECKPOINT_DIR, neuron_config.amp_dtype)
        save_config(opt_config, staging, neuron_config.amp_dtype)
        save_companions(path, opt_config, staging)
        neuron_config.to_json_file(staging / NEURON_CONFIG_NAME)
        target.compile(opt_config, neuron_config, staging, eager)
    return output


def find_export(model_id: str | os.PathLike, hub: dict[str, Any]) -> Path | None:
    """The local directory of the export `model_id`, downloaded if need be; None if that is not an export.

    `hub` has the options of an id on the hub: revision, token, cache_dir, force_download, local_files_only.
    """
    path = Path(model_id)
    if path.is_dir():
        return path if _is_export(path) else None
    if cached_file(str(model_id), NEURON_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is None:
        return None
    return Path(snapshot_download(str(model_id), **hub))


def copy_export(source: Path, output: Path, generation_config: GenerationConfig) -> None:
    """Copies an export with another generation config; `output` is then whole, or as it was.

    Weights and what was compiled, which nobody edits, are hard links where the file system allows.

    Raises:
        FileExistsError: if `output` holds anything but an export.
    """
    _check_output(output, source)
    with _staged(output, keep=()) as staging:
        shutil.copytree(source, staging, copy_function=_link_or_copy, dirs_exist_ok=True)
        generation_config.save_pretrained(staging)


def _is_export(directory: Path) -> bool:
    return (directory / NEURON_CONFIG_NAME).is_file()


def _check_output(output: Path, source: str | os.PathLike) -> None:
    if output.exists() and Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise FileExistsError(f"{output} is the source itself: choose another output directory.")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _is_export(output)):
        raise FileExistsError(f"{output} exists and is not an export: choose another output directory, or remove it.")


@contextmanager
def _staged(output: Path, keep: tuple[str, ...] = (CHECKPOINT_DIR,)) -> Iterator[Path]:
    """A directory beside `output` that takes its place when the block ends well, and is removed when it does not.

    At every moment either what was at `output` before is whole there, or what was written is. What a process left
    there that was killed is removed, but for `keep`.

    Raises:
        BlockingIOError: if another process is writing the same output.
    """
    output = output.resolve()  # of a link, what it points to is replaced
    staging = output.with_name(f".{output.name}.partial")
    with exclusive(staging):
        try:
            for left in staging.iterdir():
                if left.name not in keep:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield staging
            if not output.exists():
                os.rename(staging, output)
                return
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        # The lock that is held moves along with what was written; another one keeps others from the remains.
        with exclusive(output):
            try:
                _exchange(staging, output)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, output: Path) -> None:
    """Swaps two directories, atomically where the system can (Linux: renameat2 with RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    if renameat2 and renameat2(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(output), exchange) == 0:
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.rename(output, old / output.name)
    os.rename(staging, output)
    shutil.rmtree(old)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith((".safetensors", ".so", ".pt")):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)
