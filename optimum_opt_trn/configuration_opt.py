"""OPTNeuronConfig: everything that is decided at export time, in one typed, immutable object."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from .buckets import SHORTEST_SEQUENCE, check_buckets, default_cache_buckets, default_prompt_buckets
from .dtypes import normalize_dtype, normalize_weight_dtype, to_torch
from .hardware import FAMILIES
from .host_framework import NeuronConfig, get_neuronxcc_version, optimum_neuron_version, register_neuron_config
from .version import __version__


# To be raised when directories written before can no longer be read. Only this decides about compatibility.
FORMAT_VERSION = 1

_DERIVED_OPTIONS = ("target", "checkpoint_id", "checkpoint_revision", "format_version")


def reject_unknown(options: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises TypeError for the first of `options` that is not in `known`, naming the nearest known one."""
    known = sorted(known)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options: {', '.join(known)}."
            raise TypeError(f"{where} has no option {option!r}: {hint}")


def normalize_adapters(value: Any) -> tuple[str, ...]:
    """LoRA adapters, in the form in which an OPTNeuronConfig has them.

    Args:
        value: a directory or an id on the hub, several of them, or a dictionary with the weight of each. A weight may
            also stand behind a name (`DIR=0.5`).

    Returns:
        Each name, with its weight behind it where that is not 1.

    Raises:
        ValueError: for a weight that is not a finite number, for an empty name, and for one that is given twice.
        TypeError: for anything else than names.
    """
    if value is None:
        return ()
    given = list(value.items()) if isinstance(value, Mapping) else [value] if is_name(value) else list(value)
    normal: dict[str, str] = {}
    for item in given:
        name, weight = item if isinstance(item, tuple) else (item, None)
        if not is_name(name):
            raise TypeError(f"adapter={value!r}: an adapter is a directory or an id on the hub, not {name!r}.")
        if weight is None:
            name, weight = split_adapter(os.fspath(name))
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"adapter={value!r}: the weight of {name} must be a number, not {weight!r}.")
        name = os.fspath(name)
        if not name or name in normal:
            raise ValueError(f"adapter={value!r}: {f'{name} is given twice' if name else 'a name is empty'}.")
        normal[name] = name if weight == 1 and split_adapter(name)[0] == name else f"{name}={float(weight)}"
    return tuple(normal.values())


def is_name(value: Any) -> bool:
    """Whether a value may name a directory or an id on the hub."""
    return isinstance(value, (str, os.PathLike))


def split_adapter(text: str) -> tuple[str, float]:
    """The name and the weight of `NAME=WEIGHT`; without a number behind it, the weight is 1."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


@register_neuron_config
@dataclass(eq=False, repr=False, kw_only=True)
class OPTNeuronConfig(NeuronConfig):
    """What an OPT export was made for.

    Args:
        batch_size: rows that a call holds at most (slots of the key/value cache).
        sequence_length: tokens of prompt and continuation that a row holds at most.
        tp_degree: tensor-parallel degree, the number of ranks (NeuronCores; local ranks on `cpu`).
        amp: dtype of attention, MLP, embedding and lm_head weights (`f16`, `bf16`, `f32`; the usual aliases are
            normalised). Layernorms and position embeddings stay float32.
        weight_dtype: `int8` for the matrices of attention and MLP and the head, each output channel with a float32
            scale; None for `amp`. A head that is not int8 in a checkpoint whose matrices are stays as it is.
        kv_cache_dtype: dtype of the key/value cache, by default `amp`.
        max_topk: how many of the best tokens sampling on the device chooses among.
        instance_type: the instance family (`cpu`, `trn1`, `trn1n`, `inf2`, `trn2`).
        target: the compile target that follows from it (`cpu`, `trn1`, `trn2`).
        prompt_buckets: static prompt lengths, ascending; the last is `sequence_length`. By default they suit the
            target: on `cpu`, which takes any length, only that one.
        cache_buckets: static lengths of the part of the cache that a step attends to, ascending; the last is
            `sequence_length`. `cpu` does not use them.
        prompt_embeddings: whether a graph more is compiled, which takes prompts as embeddings (`inputs_embeds`). `cpu`
            takes them in any case.
        adapter: LoRA adapters that were merged into the weights (see `normalize_adapters`).
        checkpoint_id, checkpoint_revision: hub id and commit of the source; None for a local one.
        format_version: the format of the export directory; only this decides whether a directory can be read.

    Raises:
        TypeError: for an unknown option; the message names the nearest one.
        ValueError: for a value out of range; the message names it, the limit and the way out.
        AttributeError: on assignment to a field of a finished object.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    tp_degree: int = 1
    amp: str = "f16"
    weight_dtype: str | None = None
    kv_cache_dtype: str | None = None
    max_topk: int = 256
    instance_type: str = "cpu"
    target: str | None = None
    prompt_buckets: tuple[int, ...] = ()
    cache_buckets: tuple[int, ...] = ()
    prompt_embeddings: bool = False
    adapter: tuple[str, ...] = ()
    checkpoint_id: str | None = None
    checkpoint_revision: str | None = None
    format_version: int = FORMAT_VERSION

    def __new__(cls, **options: Any) -> OPTNeuronConfig:
        reject_unknown(options, cls.option_names(), cls.__name__)
        return super().__new__(cls)  # the rest is the dataclass's __init__

    def __post_init__(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This export has format {self.format_version}, and this version of optimum_opt_trn ({__version__}) "
                f"reads up to {FORMAT_VERSION}: upgrade optimum_opt_trn, or export the model again."
            )
        for name in ("batch_size", "sequence_length", "tp_degree", "max_topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number.")
        if self.sequence_length < SHORTEST_SEQUENCE:
            raise ValueError(f"sequence_length={self.sequence_length} is too short: the least is {SHORTEST_SEQUENCE}.")
        self.amp = normalize_dtype(self.amp)
        self.weight_dtype = normalize_weight_dtype(self.weight_dtype, self.amp)
        self.kv_cache_dtype = normalize_dtype(self.kv_cache_dtype or self.amp, "kv_cache_dtype")
        if self.instance_type not in FAMILIES:
            raise ValueError(f"instance_type={self.instance_type!r} is not one of {', '.join(FAMILIES)}.")
        target = FAMILIES[self.instance_type].target
        if self.target not in (None, target):
            raise ValueError(
                f"target={self.target!r} does not fit instance_type={self.instance_type!r}, whose target is "
                f"{target!r}: give only instance_type."
            )
        self.target = target
        length = self.sequence_length
        prompts = self.prompt_buckets or default_prompt_buckets(length, target)
        caches = self.cache_buckets or default_cache_buckets(length, target)
        self.prompt_buckets = check_buckets("prompt_buckets", prompts, length)
        self.cache_buckets = check_buckets("cache_buckets", caches, length)
        if not isinstance(self.prompt_embeddings, bool):
            raise ValueError(f"prompt_embeddings={self.prompt_embeddings!r} must be True or False.")
        self.adapter = normalize_adapters(self.adapter)
        self._frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise AttributeError(
                f"OPTNeuronConfig is immutable: {name} is decided at export. Make a new one, for example "
                f"OPTNeuronConfig(**{{**config.options(), {name!r}: …}})."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"OPTNeuronConfig is immutable: {name} is decided at export.")

    @property
    def amp_dtype(self) -> torch.dtype:
        return to_torch(self.amp)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights, under the name that callers in optimum-neuron read."""
        return self.amp_dtype

    @property
    def on_device_sampling(self) -> bool:
        """Read by callers in optimum-neuron: whether calls with `sampling_params` return tokens instead of logits."""
        return True

    @property
    def continuous_batching(self) -> bool:
        """What optimum-neuron's callers ask: whether each call says which slots it is for (`seq_ids`)."""
        return True

    @property
    def cache_dtype(self) -> torch.dtype:
        return to_torch(self.kv_cache_dtype or self.amp)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    @classmethod
    def export_options(cls) -> tuple[str, ...]:
        """The options that a user chooses; the others follow from these and from the source."""
        return tuple(name for name in cls.option_names() if name not in _DERIVED_OPTIONS)

    def options(self) -> dict[str, Any]:
        """The fields, as keyword arguments that make an equal object."""
        return {name: getattr(self, name) for name in self.option_names()}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary: the fields, and what optimum-neuron's own configurations carry."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options().items()}
        # optimum-neuron's generic loader finds this class by the key, and refuses other versions than its own.
        return {
            **options,
            "_serialized_key": type(self).__name__,
            "optimum_neuron_version": optimum_neuron_version,
            "neuronxcc_version": _neuronxcc_version(),
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> OPTNeuronConfig:
        """The inverse of `to_dict`, for a dictionary that any version of optimum-neuron wrote.

        Raises:
            ValueError: if the dictionary is not an OPTNeuronConfig's, or was written in a newer format.
            TypeError: for an unknown key.
        """
        values = dict(config_dict)
        for key in ("optimum_neuron_version", "neuronxcc_version"):
            values.pop(key, None)
        kind = values.pop("_serialized_key", None)
        if kind != cls.__name__ or not isinstance(values.get("format_version"), int):
            raise ValueError(
                f"This neuron configuration was written for {kind}, not for an OPT export by optimum_opt_trn: "
                "export the model with `optimum-cli export neuron`."
            )
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OPTNeuronConfig) and self.options() == other.options()

    def __hash__(self) -> int:
        return hash(tuple(self.options().values()))

    def __repr__(self) -> str:
        return f"OPTNeuronConfig({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


def _neuronxcc_version() -> str | None:
    """The compiler's version; None if the SDK is not installed."""
    try:
        return get_neuronxcc_version()
    except (ImportError, ModuleNotFoundError):
        return None
