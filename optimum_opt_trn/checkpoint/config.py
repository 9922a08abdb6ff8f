"""config.json, which has to be an OPT's: loaded, and checked in one place before anything reads it.

transformers 4.57 loads a config.json with any values, and fails later, or gives a model that is not the one meant;
transformers 5 refuses some, in many lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, OPTConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import CONFIG_NAME

from .quantization import quantization_problem


_COUNTS = (
    *("vocab_size", "hidden_size", "word_embed_proj_dim", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
    "max_position_embeddings",
)
# Far beyond any OPT. Larger numbers would be a damaged file, and take all memory before anything else is compared.
_LIMIT, _LIMITS = 2**24, {"num_hidden_layers": 10_000}
_SWITCHES = (
    *("do_layer_norm_before", "_remove_final_layer_norm", "layer_norm_elementwise_affine"),
    *("enable_bias", "tie_word_embeddings"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(source: str | os.PathLike, **hub: Any) -> OPTConfig:
    """The configuration of the OPT `source`, a local directory or an id on the hub.

    Args:
        source: which model: an OPT, or one that has an OPT as its language model, as BLIP-2.
        hub: revision, token, cache_dir, force_download, local_files_only, as in transformers.

    Raises:
        OSError: if there is no config.json. (transformers would guess the model type from the directory's name.)
        ValueError: if it is of another model_type, or has a value that no OPT has; TypeError if `source` is no name.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise TypeError(f"The model must be a directory or an id on the hub, not {source!r}.")
    if Path(source).is_file():
        raise OSError(f"{source} is a file: give the directory that holds the model, {Path(source).parent}.")
    local = Path(source).is_dir()
    if local and not (Path(source) / CONFIG_NAME).is_file():
        raise OSError(f"{source} has no {CONFIG_NAME}: it is not a model's directory, or incomplete.")
    try:
        given, _ = PretrainedConfig.get_config_dict(source, **hub)
    except OSError as error:
        if local:
            raise OSError(
                f"{source}: its {CONFIG_NAME} is not valid JSON. Correct the file, or fetch it again."
            ) from error
        raise OSError(f"{source} is not a local directory, and cannot be fetched from the hub: {error}") from error
    if (values := opt_values(given)) is not None:
        check_values(values, source)
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except OSError:
        raise
    except Exception as error:  # of many kinds: an AttributeError for a dtype that torch has not, for example
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source}: its {CONFIG_NAME} cannot be read ({cause}). Correct the file.") from error
    return check_opt(config, source)


def opt_values(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of the OPT: all of it, or, of a BLIP-2, its `text_config`; None if there is no OPT.

    Args:
        given: what config.json holds.
    """
    text = given.get("text_config")
    for values in (given, text):
        if isinstance(values, Mapping) and values.get("model_type") == "opt":
            return values
    return None


def check_opt(config: PretrainedConfig, source: Any) -> OPTConfig:
    """`config`, or its `text_config` if that is the OPT, as in a BLIP-2.

    Raises:
        ValueError: if neither is an OPT's, or for a value that no OPT has.
    """
    text = getattr(config, "text_config", None)
    opt = config if config.model_type == "opt" else text
    if getattr(opt, "model_type", None) != "opt":
        raise ValueError(
            f"{source} is of model_type {config.model_type!r}, and optimum_opt_trn serves only 'opt', alone or as the "
            "language model of a BLIP-2. For other models see optimum-neuron."
        )
    assert opt is not None
    if opt is not config:
        opt._commit_hash = getattr(config, "_commit_hash", None)
    check_values(opt.to_dict(), source)
    return opt


def check_values(given: Mapping[str, Any], source: Any) -> None:
    """Checks the values that this package, or transformers, computes with.

    Args:
        given: what config.json holds; the rest has the defaults of an OPT.
        source: what messages call it.

    Raises:
        ValueError: for the first wrong value, naming it, the limit and the way out.
    """
    values = {**OPTConfig().to_dict(), **given}
    for name in _COUNTS:
        value = values[name]
        if type(value) is not int or value < 1:
            _refuse(source, name, value, "it must be a positive whole number")
        if value > _LIMITS.get(name, _LIMIT):
            _refuse(source, name, value, f"no OPT has more than {_LIMITS.get(name, _LIMIT)}")
    for name in _SWITCHES:
        value = values[name]
        if not isinstance(value, bool):
            _refuse(source, name, value, "it must be true or false")
    check_tokens(values, f"{source}: its config.json")
    activation = values["activation_function"]
    if not isinstance(activation, str) or activation not in ACT2FN:
        _refuse(source, "activation_function", activation, "OPT has 'relu', Galactica 'gelu'")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if hidden % heads:
        _refuse(source, "num_attention_heads", heads, f"it must divide hidden_size={hidden}")
    quantization = values.get("quantization_config")
    if quantization is not None and (problem := quantization_problem(quantization)):
        raise ValueError(f"{source}: its config.json has a quantization_config, {problem}")


def check_tokens(values: Mapping[str, Any], origin: str) -> None:
    """Checks the special tokens in a config.json or generation_config.json; `origin` is what the message calls it.

    Raises:
        ValueError: for the first that is no number of a token.
    """
    for name in _TOKENS:
        value = values.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
        if value is not None and not all(type(i) is int and abs(i) <= _LIMIT for i in ids):
            raise ValueError(
                f"{origin} has {name}={value!r}, and it must be the number of a token, or null. Correct the file, or "
                "fetch it again."
            )


def _refuse(source: Any, name: str, value: Any, limit: str) -> None:
    raise ValueError(
        f"{source}: its config.json has {name}={value!r}, and {limit}. Correct the file, or fetch it again."
    )
