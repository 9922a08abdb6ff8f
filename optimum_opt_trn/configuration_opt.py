"""OPTNeuronConfig: everything that is decided at export time, in one typed, immutable object."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import OPTConfig

from .buckets import SHORTEST_SEQUENCE, check_buckets, default_cache_buckets, default_prompt_buckets
from .host_framework import NeuronConfig, get_neuronxcc_version, optimum_neuron_version, register_neuron_config
from .version import __version__


# Raised when a directory written before can no longer be read; nothing else decides about compatibility.
FORMAT_VERSION = 1

AMP_DTYPES: dict[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_DTYPE_ALIASES = {
    "fp16": "f16", "float16": "f16", "half": "f16",
    "bfloat16": "bf16",
    "fp32": "f32", "float32": "f32", "float": "f32",
}  # fmt: skip

# Instance family -> compile target. inf2 and trn1 have the same NeuronCore-v2
# (awsdocs-neuron, "NeuronCore-v2 Architecture"); optimum-neuron maps them in the same way.
COMPILE_TARGETS = {"cpu": "cpu", "trn1": "trn1", "trn1n": "trn1", "inf2": "trn1", "trn2": "trn2"}


def normalize_dtype(value: str | torch.dtype, option: str = "amp") -> str:
    """`value` (`"f16"`, `"fp16"`, `"float16"`, `torch.float16`, …) as one of `f16`, `bf16`, `f32`.

    Raises:
        ValueError: for any other value; the message names `option`, the value and the choices.
    """
    name = str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in AMP_DTYPES:
        raise ValueError(f"{option}={value!r} is not a dtype that OPT is exported in: choose f16, bf16 or f32.")
    return name


def reject_unknown(options: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises TypeError for the first of `options` that is not in `known`, naming the nearest known one."""
    known = sorted(known)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options: {', '.join(known)}."
            raise TypeError(f"{where} has no option {option!r}: {hint}")


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
        kv_cache_dtype: dtype of the key/value cache, by default `amp`.
        max_topk: how many of the best tokens sampling on the device chooses among.
        instance_type: the instance family (`cpu`, `trn1`, `trn1n`, `inf2`, `trn2`).
        target: the compile target that follows from it (`cpu`, `trn1`, `trn2`).
        prompt_buckets: static prompt lengths, ascending; the last is `sequence_length`. By default what suits the
            target: on `cpu`, which takes any length as it is, that one.
        cache_buckets: static lengths of the part of the cache that a step attends to, likewise; `cpu` has no use for
            them.
        checkpoint_id, checkpoint_revision: hub id and commit of the source; None for a local one.
        format_version: of the export directory; it alone decides whether a directory can be read.

    Raises:
        TypeError: for an unknown option; the message names the nearest one.
        ValueError: for a value out of range; the message names it, the limit and the way out.
        AttributeError: on assignment to a field of a finished object.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    tp_degree: int = 1
    amp: str = "f16"
    kv_cache_dtype: str | None = None
    max_topk: int = 256
    instance_type: str = "cpu"
    target: str | None = None
    prompt_buckets: tuple[int, ...] = ()
    cache_buckets: tuple[int, ...] = ()
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
        self.kv_cache_dtype = normalize_dtype(self.kv_cache_dtype or self.amp, "kv_cache_dtype")
        if self.instance_type not in COMPILE_TARGETS:
            raise ValueError(f"instance_type={self.instance_type!r} is not one of {', '.join(COMPILE_TARGETS)}.")
        target = COMPILE_TARGETS[self.instance_type]
        if self.target not in (None, target):
            raise ValueError(
                f"target={self.target!r} does not fit instance_type={self.instance_type!r}, whose target is "
                f"{target!r}: give instance_type alone."
            )
        self.target = target
        length = self.sequence_length
        prompts = self.prompt_buckets or default_prompt_buckets(length, target)
        caches = self.cache_buckets or default_cache_buckets(length, target)
        self.prompt_buckets = check_buckets("prompt_buckets", prompts, length)
        self.cache_buckets = check_buckets("cache_buckets", caches, length)
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

    def check_model(self, config: OPTConfig) -> None:
        """Checks that a model of `config` can be exported in this way.

        Raises:
            ValueError: if `sequence_length` exceeds the positions that the model has, or if its heads or its MLP
                cannot be split into `tp_degree` equal parts; the message names the limit and what would do.
        """
        limit = config.max_position_embeddings
        if self.sequence_length > limit:
            raise ValueError(
                f"sequence_length={self.sequence_length} exceeds the {limit} positions that the model was trained "
                f"with (max_position_embeddings): choose at most {limit}."
            )
        heads, ffn_dim = config.num_attention_heads, config.ffn_dim
        degrees = [n for n in range(1, heads + 1) if heads % n == 0 and ffn_dim % n == 0]
        if self.tp_degree not in degrees:
            raise ValueError(
                f"tp_degree={self.tp_degree} cannot split {heads} attention heads and an MLP of {ffn_dim} into equal "
                f"parts: choose one of {', '.join(map(str, degrees))}."
            )

    @property
    def amp_dtype(self) -> torch.dtype:
        return AMP_DTYPES[self.amp]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The name by which optimum-neuron's own callers read the weight dtype."""
        return self.amp_dtype

    @property
    def on_device_sampling(self) -> bool:
        """What optimum-neuron's own callers ask: whether calls with `sampling_params` return tokens, not logits."""
        return True

    @property
    def cache_dtype(self) -> torch.dtype:
        return AMP_DTYPES[self.kv_cache_dtype or self.amp]

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    def options(self) -> dict[str, Any]:
        """The fields, as keyword arguments that make an equal object."""
        return {name: getattr(self, name) for name in self.option_names()}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary: the fields, and what optimum-neuron's own configurations carry."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options().items()}
        # optimum-neuron's generic loader finds our class by the key, and refuses other versions than its own.
        return {
            **options,
            "_serialized_key": type(self).__name__,
            "optimum_neuron_version": optimum_neuron_version,
            "neuronxcc_version": _neuronxcc_version(),
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> OPTNeuronConfig:
        """The inverse of `to_dict`, whatever version of optimum-neuron wrote it.

        Raises:
            ValueError: if the dictionary is not one of ours, or was written in a newer format.
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
    """The compiler's version where the SDK is installed, else None."""
    try:
        return get_neuronxcc_version()
    except (ImportError, ModuleNotFoundError):
        return None
