"""Writing the split checkpoint: an ordinary Hugging Face checkpoint with one safetensors file for each layer.

At most one file's tensors are in memory at a time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, OPTConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_opt import AMP_DTYPES, normalize_dtype
from .config import check_opt, load_config, save_config
from .layout import INDEX_NAME, checkpoint_files
from .source import CheckpointError, WeightSource, open_directory, open_model


logger = logging.get_logger(__name__)

# What is needed of a repository on the hub: weights in one of the two forms, configurations, tokenizer.
_HUB_FILES = ["*.json", "*.txt", "*.model"]


def save_pretrained_split(
    source: PreTrainedModel | str | os.PathLike,
    directory: str | os.PathLike,
    amp: str | torch.dtype = "f16",
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Writes OPT weights as a split checkpoint, with attention, MLP, embedding and head in `amp`.

    Layernorms and position embeddings are float32. `OPTForCausalLM.from_pretrained` loads the result. Generation
    config and tokenizer come along, where the source has them.

    Args:
        source: a loaded `OPTForCausalLM` (not changed), a local directory, or an id on the hub.
        directory: where to write; made if it is not there.
        amp: `f16`, `bf16` or `f32`.
        revision, token, cache_dir, force_download, local_files_only: for an id on the hub, as in transformers.

    Returns:
        The directory.

    Raises:
        CheckpointError: if the weights are not those of an OPT model with the source's config.json.
        ValueError: if the source is not an OPT, or `amp` not one of the three.
        OSError: if the source is not there.
    """
    dtype = AMP_DTYPES[normalize_dtype(amp)]
    if isinstance(source, PreTrainedModel):
        config, weights = check_opt(source.config, type(source).__name__), open_model(source)
    else:
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        config = load_config(source, **hub)
        path = fetch(source, force_download=force_download, **hub)
        weights = open_directory(path)
    written = write_split(weights, config, Path(directory), dtype)
    if isinstance(source, PreTrainedModel):
        if source.generation_config is not None:
            source.generation_config.save_pretrained(written)
    else:
        save_companions(path, config, written)
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
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    except Exception as error:  # whatever the loader of some tokenizer raises; without files it can be an ImportError
        cause = str(error).strip().partition("\n")[0]
        logger.warning(f"{source} has no tokenizer that can be loaded, so {directory} has none ({cause}).")


def fetch(
    source: str | os.PathLike,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local directory of a checkpoint: `source` itself, or a download of that id's safetensors (else .bin) files.

    Raises:
        OSError: if there is no such directory and no such id.
    """
    path = Path(source)
    if path.is_dir():
        return path
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    try:
        local = Path(snapshot_download(str(source), allow_patterns=[*_HUB_FILES, "*.safetensors"], **options))
        if not any(local.glob("*.safetensors")):
            local = Path(snapshot_download(str(source), allow_patterns=[*_HUB_FILES, "*.bin"], **options))
    except (HFValidationError, OSError) as error:
        raise OSError(f"{source} is no local directory, and cannot be had from the hub: {error}") from error
    return local


def write_split(weights: WeightSource, config: OPTConfig, directory: Path, amp: torch.dtype) -> Path:
    """Writes the files of the split form to `directory`; each is renamed into place when it is whole, the index last.

    Raises:
        CheckpointError: see `WeightSource`; the directory then has no index, and is no checkpoint.
    """
    weights.check(config)
    directory.mkdir(parents=True, exist_ok=True)
    files = checkpoint_files(config)
    if clash := [f.name for f in directory.glob("*.safetensors") if f.name not in files]:
        raise CheckpointError(f"{directory} already holds {clash[0]}, which is no part of a split checkpoint.")
    (directory / INDEX_NAME).unlink(missing_ok=True)
    weight_map, total = {}, 0
    size = sum(_bytes(spec.shape, spec.dtype(amp)) for specs in files.values() for spec in specs.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Splitting") as progress:
        for file, specs in files.items():
            tensors = {name: weights.read(name, spec, amp) for name, spec in specs.items()}
            _write(directory / file, tensors)
            written = sum(t.nbytes for t in tensors.values())
            weight_map.update(dict.fromkeys(tensors, file))
            total += written
            progress.update(written)
            del tensors  # before those of the next file are read
    save_config(config, directory, amp)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = directory / f"{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(partial, directory / INDEX_NAME)
    return directory


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    # The metadata is what transformers reads to know that the tensors are PyTorch's.
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)
