"""Export: a checkpoint becomes a split checkpoint, compiled artifacts and configurations, in one directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from .checkpoint.config import check_opt, load_config
from .checkpoint.hub import open_checkpoint
from .checkpoint.layout import CHECKPOINT_DIR, CheckpointError, checkpoint_files
from .checkpoint.listing import Listed, checkpoint_entries, read_export_manifest, record, write_export_manifest
from .checkpoint.lock import one_writer
from .checkpoint.manifest import MANIFEST_NAME, read_manifest
from .checkpoint.small_files import save_config, save_small_files
from .checkpoint.write import write_split
from .configuration_opt import OPTNeuronConfig
from .host_framework import NEURON_CONFIG_NAME
from .planning.memory import check_fit, check_model
from .targets import get_target
from .targets.base import COMPILED_DIR


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
    Hugging Face checkpoint, one file a layer), `compiled/`, and export_manifest.json with a hash of each file. It is
    written to a directory next to `output`, which is renamed when it is complete: an interrupted export leaves what
    was there before. If the source is a split checkpoint in the same amp, or an export with one, the files are linked
    where the file system allows.

    Args:
        source: a local directory or an id on the hub. An export is exported again from its `checkpoint/`.
        output: a directory that does not exist, is empty, or holds an earlier export, which is replaced.
        neuron_config: the options of the export.
        config: the model's configuration; by default it is read from the source.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.
        eager: skips compilation. On `neuron` such an export runs only eagerly, on the host's CPU. On `cpu` only the
            copy of fc2 is left out that lets decoding skip zero units.
        force: exports even if the device's memory is too small.

    Returns:
        The output directory.

    Raises:
        ValueError: if the source is not an OPT, or does not fit `neuron_config`; DoesNotFitError if `neuron_config`
            needs more memory than there is; CheckpointError if its weights do not fit its config.json, or an adapter
            cannot be merged.
        FileExistsError: if `output` holds anything but an export.
        OSError: if the source does not exist, the disk is full, or another process is writing this output.
        TargetError: if the target is not available on this host.
    """
    output = Path(output)
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    amp, weight_dtype = neuron_config.amp, neuron_config.weight_dtype
    _check_output(output, source)
    opt_config = load_config(source, **hub) if config is None else check_opt(config, source)
    check_model(opt_config, neuron_config)
    check_fit(opt_config, neuron_config, force)
    target = get_target(neuron_config)
    files = checkpoint_files(opt_config, amp, weight_dtype)

    with _staged(output) as staging:
        checkpoint = open_checkpoint(source, files, adapter=neuron_config.adapter, **hub)
        save = partial(save_config, opt_config, amp, weight_dtype=weight_dtype)
        write_split(checkpoint.weights, staging / CHECKPOINT_DIR, amp, save)
        length = neuron_config.sequence_length
        save_small_files(checkpoint.directory, opt_config, amp, staging, length, weight_dtype)
        neuron_config.to_json_file(staging / NEURON_CONFIG_NAME)
        target.compile(opt_config, neuron_config, staging, eager)
        write_export_manifest(staging, _checkpoint_hashes(staging))
    return output


def find_export(model_id: str | os.PathLike, hub: dict[str, Any]) -> Path | None:
    """The local directory of the export `model_id`, downloaded if necessary; None if it is not an export.

    `hub` has the options of an id on the hub: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        CheckpointError: for an export without its neuron_config.json.
    """
    path = Path(model_id)
    if path.is_dir():
        if not _is_export(path) and (path / CHECKPOINT_DIR).is_dir() and (path / COMPILED_DIR).is_dir():
            raise CheckpointError(
                f"{path} is an export whose {NEURON_CONFIG_NAME} is missing: export the model again, from "
                f"{path / CHECKPOINT_DIR} for example."
            )
        return path if _is_export(path) else None
    if cached_file(str(model_id), NEURON_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is None:
        return None
    return Path(snapshot_download(str(model_id), **hub))


def copy_export(source: Path, output: Path, generation_config: GenerationConfig) -> None:
    """Copies an export with another generation config; if that fails, `output` is unchanged.

    Weights and compiled files, which nobody edits, are linked where the file system allows.

    Raises:
        FileExistsError: if `output` holds anything but an export.
    """
    _check_output(output, source)
    with _staged(output, keep=()) as staging:
        shutil.copytree(source, staging, copy_function=_link_or_copy, dirs_exist_ok=True)
        save_generation_config(staging, generation_config)
        if read_export_manifest(staging) is None:  # of an earlier version
            write_export_manifest(staging)


def save_generation_config(directory: Path, generation_config: GenerationConfig) -> None:
    """Writes the generation config of the export in `directory`."""
    generation_config.save_pretrained(directory)
    record(directory, (GENERATION_CONFIG_NAME,))


def _checkpoint_hashes(directory: Path) -> dict[str, Listed]:
    """What the manifest of an export's checkpoint has of its weights, so that they are not read again."""
    manifest = read_manifest(directory / CHECKPOINT_DIR / MANIFEST_NAME)
    return checkpoint_entries(manifest.files) if manifest else {}


def _is_export(directory: Path) -> bool:
    return (directory / NEURON_CONFIG_NAME).is_file()


def _check_output(output: Path, source: str | os.PathLike) -> None:
    if output.exists() and Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise FileExistsError(f"{output} is the source itself: choose another output directory.")
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _is_export(output)):
        raise FileExistsError(f"{output} exists and is not an export: choose another output directory, or remove it.")


@contextmanager
def _staged(output: Path, keep: tuple[str, ...] = (CHECKPOINT_DIR,)) -> Iterator[Path]:
    """A directory next to `output`. It replaces `output` when the block succeeds, and is removed when it fails.

    At every moment, the old content or the new one is complete: at `output`, or, between the two renames, in
    `.NAME.old` next to it, from where the next call restores it. What a killed process left in the directory is
    removed, except for `keep`.

    Raises:
        BlockingIOError: if another process is writing the same output.
    """
    output = output.resolve()  # a link stays, and its target is replaced
    staging, old = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")
    with one_writer(output):
        try:
            _finish_swap(output, old)
            staging.mkdir(exist_ok=True)
            for left in staging.iterdir():
                if left.name not in keep:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield staging
            if output.exists():
                os.rename(output, old)
            os.rename(staging, output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            _finish_swap(output, old)


def _finish_swap(output: Path, old: Path) -> None:
    """Repairs an incomplete swap: restores `old` to `output`, or removes it if an export has replaced it."""
    if old.exists() and not _is_export(output):
        os.rename(old, output)  # missing, or an empty directory
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith((".safetensors", ".so", ".pt")):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)
