"""Compiled kernels on disk: how they are made, and when they may be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...checkpoint import CheckpointError
from ..manifest import MANIFEST_NAME, sha256
from .kernels import LIBRARY_NAME, CompileError, compile_kernels, source_hash
from .kernels import host as this_host


logger = logging.get_logger(__name__)


def write_artifacts(directory: Path, eager: bool) -> None:
    """Compiles the kernels to `directory` and writes the manifest, last.

    Where they cannot be compiled, the manifest lists no artifacts, one warning says so, and the export runs eagerly;
    as it does if `eager`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / LIBRARY_NAME
    artifacts: dict[str, dict[str, Any]] = {}
    if not eager:
        try:
            shutil.copyfile(compile_kernels(), library)
            artifacts[LIBRARY_NAME] = _entry(library)
        except CompileError as error:
            logger.warning(
                f"The kernels could not be compiled ({error}), so this export will run eagerly, correct and slower. "
                "See to that and export again."
            )
    manifest = {"host": this_host(), "source": source_hash(), "artifacts": artifacts}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def find_kernels(directory: Path) -> Path | None:
    """The export's kernels; others, compiled here and now, where those are for another host or version.

    None, with one warning, where there are none, or none can be compiled.

    Raises:
        CheckpointError: if the manifest or the kernels are missing or broken.
    """
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        host, source, artifacts = dict(manifest["host"]), manifest["source"], dict(manifest["artifacts"])
        if artifacts and artifacts.keys() != {LIBRARY_NAME}:
            raise ValueError(f"it lists {', '.join(artifacts)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST_NAME} is missing or broken ({error}): export the model again, or load it with "
            "eager=True."
        ) from error
    reason = None
    here = this_host()
    differing = [f"{key} {host.get(key)} (here {here[key]})" for key in here if host.get(key) != here[key]]
    if not artifacts:
        reason = "it was exported without compilation"
    elif source != source_hash() or differing:
        made_for = f"for {', '.join(differing)}" if differing else "by another version of optimum_opt_trn"
        try:
            return compile_kernels()
        except CompileError as error:
            reason = f"its kernels were compiled {made_for}, and could not be compiled again ({error})"
    if reason:
        logger.warning(
            f"{directory.parent} runs eagerly, correct and slower: {reason}. To compile it, export it here."
        )
        return None
    library = directory / LIBRARY_NAME
    if not library.is_file() or artifacts[LIBRARY_NAME] != _entry(library):
        raise CheckpointError(
            f"{library} is missing or not what the manifest says: export the model again, or load it with eager=True."
        )
    return library


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
