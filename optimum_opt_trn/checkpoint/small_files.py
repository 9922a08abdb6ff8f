"""The small files of a checkpoint: config.json, generation config and tokenizer, copied for new dtypes and lengths."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..dtypes import to_torch
from .layout import has_int8_head
from .quantization import is_int8, quantization_config


logger = logging.get_logger(__name__)


def load_tokenizer(source: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `source`, a local directory or an id on the hub; `options` as in transformers.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
        if tokenizer.vocab_size:
            tokenizer("a")  # what is wrong in tokenizer.json may show only here
    except BaseException as error:
        # tokenizers raise many errors; without files it can be an ImportError, and with broken ones a panic of Rust.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source} has no tokenizer that can be loaded ({cause})") from error
    if not tokenizer.vocab_size:  # what transformers 5 makes of a directory without a tokenizer
        raise ValueError(f"{source} has no tokenizer that can be loaded (it has no files of one)")
    return tokenizer


def save_config(config: OPTConfig, amp: str, directory: Path, weight_dtype: str | None = None) -> None:
    """Writes config.json for weights in `amp`, or in int8; `config`, of the source, is not changed."""
    saved = copy.deepcopy(config)
    saved.architectures, saved.dtype = ["OPTForCausalLM"], to_torch(amp)
    if weight_dtype == "int8":
        head = has_int8_head(config, weight_dtype)
        saved.quantization_config = quantization_config(head)
        if head:  # the embedding is not int8
            saved.tie_word_embeddings = False
    elif is_int8(saved):
        del saved.quantization_config
    saved.save_pretrained(directory)


def save_small_files(
    source: Path,
    config: OPTConfig,
    amp: str,
    directory: Path,
    longest: int | None = None,
    weight_dtype: str | None = None,
) -> None:
    """Writes config.json, and the generation config and the tokenizer of the checkpoint `source`, to `directory`.

    Without a tokenizer there is a warning.

    Args:
        source: a local directory.
        config: of the model.
        amp, weight_dtype: dtypes of the weights.
        directory: where to write.
        longest: tokens that the model takes at most, for the tokenizer to know; None leaves that as it is.
    """
    save_config(config, amp, directory, weight_dtype)
    generation_config = GenerationConfig.from_model_config(config)
    # A BLIP-2's generation config is for the whole model: its language model gets the defaults of its configuration.
    if PretrainedConfig.get_config_dict(source)[0].get("model_type") == "opt":
        with suppress(OSError):
            generation_config = GenerationConfig.from_pretrained(source)
    generation_config.save_pretrained(directory)
    try:
        tokenizer = load_tokenizer(source)
        if longest is not None:
            tokenizer.model_max_length = longest
        tokenizer.save_pretrained(directory)
    except ValueError as error:
        logger.warning(f"{error}, so the copy has none.")
