"""A model's config.json: read, checked to be an OPT's, and written; and its tokenizer, read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, OPTConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME


def load_config(source: str | os.PathLike, **hub: Any) -> OPTConfig:
    """The configuration of the OPT `source`, a local directory or an id on the hub.

    Args:
        source: which model.
        hub: revision, token, cache_dir, force_download, local_files_only, as in transformers.

    Raises:
        OSError: if there is none. For a directory without one, transformers would guess it by the directory's name.
        ValueError: if it is of another model_type.
    """
    if not Path(source).is_dir():
        try:
            return check_opt(AutoConfig.from_pretrained(source, **hub), source)
        except OSError as error:
            raise OSError(f"{source} is no local directory, and cannot be had from the hub: {error}") from error
    if not (Path(source) / CONFIG_NAME).is_file():
        raise OSError(f"{source} has no {CONFIG_NAME}: it is not a model's directory, or not a whole one.")
    return check_opt(AutoConfig.from_pretrained(source), source)


def load_tokenizer(source: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `source`, a local directory or an id on the hub; `options` as in transformers.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # whatever the loader of some tokenizer raises; without files it can be an ImportError
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source} has no tokenizer that can be loaded ({cause})") from error
    if not tokenizer.vocab_size:  # what transformers 5 makes of a directory without a tokenizer
        raise ValueError(f"{source} has no tokenizer that can be loaded (it has no files of one)")
    return tokenizer


def check_opt(config: PretrainedConfig, source: Any) -> OPTConfig:
    """`config`, if it is an OPT's; ValueError else."""
    if config.model_type != "opt":
        raise ValueError(
            f"{source} is of model_type {config.model_type!r}, and optimum_opt_trn serves 'opt' alone. For other "
            "models see optimum-neuron."
        )
    return config


def save_config(config: OPTConfig, directory: Path, amp: torch.dtype) -> None:
    """Writes config.json for weights in `amp`; `config` is left as it is."""
    saved = OPTConfig.from_dict(config.to_dict())
    saved.architectures, saved.dtype = ["OPTForCausalLM"], amp
    saved.save_pretrained(directory)
