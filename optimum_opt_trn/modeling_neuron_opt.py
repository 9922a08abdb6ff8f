"""NeuronOPTForCausalLM: the class that users hold."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, OPTConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME, logging

from .checkpoint import CheckpointError, push_to_hub, verify_checkpoint
from .checkpoint.config import check_opt, check_tokens, load_config
from .checkpoint.quantization import is_int8
from .checkpoint.small_files import load_tokenizer
from .checkpoint.verify import find_unlisted
from .configuration_opt import OPTNeuronConfig, normalize_adapters, reject_unknown
from .dtypes import normalize_dtype, normalize_weight_dtype
from .export import copy_export, export_opt, find_export, save_generation_config
from .hardware import FAMILIES
from .host_framework import (
    INSTALLED,
    NeuronModelForCausalLM,
    get_available_cores,
    get_instance_name,
    get_neuron_major,
)
from .module_methods import ModuleMethodsMixin
from .planning.memory import check_fit, check_model
from .serving import ContinuousBatchingMixin
from .targets import Runtime, get_target
from .version import NEEDED_FOR_NEURON


logger = logging.get_logger(__name__)

# transformers' pipelines log an error for a class that is not in this table; under a private key it changes nothing
# else, since Auto classes look up model types.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("_neuron_opt", "NeuronOPTForCausalLM")

# No call of from_pretrained without a length should reserve more than this many positions; optimum-neuron's limit.
LONGEST_DEFAULT_SEQUENCE = 4096

_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# Accepted and without effect: pipelines pass it to every model.
_IGNORED_OPTIONS = ("_commit_hash",)
_ALIASES = {"tp_degree": "tensor_parallel_size", "dtype": "amp", "torch_dtype": "amp"}


class NeuronOPTForCausalLM(ModuleMethodsMixin, ContinuousBatchingMixin, NeuronModelForCausalLM):
    """An exported OPT, with `generate()` as in transformers.

    Made by `from_pretrained` or `export`.

    Args:
        config: the model's configuration.
        neuron_config: what the model was exported for.
        directory: the export directory.
        runtime: the loaded graphs and weights; None for an export that was not loaded.
    """

    def __init__(
        self,
        config: OPTConfig,
        neuron_config: OPTNeuronConfig,
        directory: Path,
        runtime: Runtime | None = None,
    ):
        self.config = config
        self.neuron_config = neuron_config
        # Evaluation harnesses read here how long a text may be; max_position_embeddings is what the weights have.
        config.n_positions = neuron_config.sequence_length
        self.generation_config = _generation_config(directory, config)
        self.directory = directory
        self._loaded = runtime
        # Keeps an export that was made on the fly for as long as it is used.
        self._temporary: tempfile.TemporaryDirectory | None = None

    # NeuronModel is a dataclass whose instances are all equal, and cannot be hashed.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def runtime(self) -> Runtime:
        """The loaded graphs. RuntimeError if the model was exported without `load_weights=True`."""
        if self._loaded is None:
            raise RuntimeError(
                "This model was exported, not loaded: save it and use from_pretrained, or export with "
                "load_weights=True."
            )
        return self._loaded

    @property
    def name_or_path(self) -> str:
        return str(self.directory)

    @property
    def preprocessors(self) -> list[Any]:
        """The tokenizer that was exported with the model, if there was one."""
        try:
            return [load_tokenizer(self.directory)]
        except ValueError:
            return []

    @classmethod
    def get_neuron_config(
        cls,
        model_name_or_path: str | Path,
        config: PretrainedConfig | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        instance_type: str | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        tensor_parallel_size: int | None = None,
        **options: Any,
    ) -> OPTNeuronConfig:
        """The configuration to export a model with; what is not given gets a default that suits this host.

        Args:
            model_name_or_path: a local directory or an id on the hub.
            config: its configuration, if it is at hand.
            token, revision: for an id on the hub.
            instance_type: by default the Neuron instance that this is, else `cpu`.
            batch_size: by default 1.
            sequence_length: by default the model's positions, at most 4096.
            tensor_parallel_size: by default 1 on `cpu`, else all NeuronCores.
            options: the other options of `OPTNeuronConfig.export_options()`: `amp`, `weight_dtype` (by
                default `int8` for a checkpoint in int8), `kv_cache_dtype`, `max_topk`, `prompt_buckets`,
                `cache_buckets`, `prompt_embeddings`, `adapter`; None stands for the default.

        Raises:
            ValueError: if the model is not an OPT, or an option does not suit it.
            TypeError: for an unknown option; the message names the nearest one.
        """
        others = set(OPTNeuronConfig.export_options()) - {"tp_degree"}
        reject_unknown(options, {"tensor_parallel_size", *others}, f"{cls.__name__}.get_neuron_config")
        if config is None:
            config = load_config(model_name_or_path, token=token, revision=revision)
        opt_config = check_opt(config, model_name_or_path)
        if instance_type is None:
            # optimum-neuron's current_instance_type says trn1 of an inf2, which connects other numbers of cores.
            instance_type = "cpu" if get_neuron_major() == -1 else get_instance_name().partition(".")[0]
        if tensor_parallel_size is None:
            # An unknown family is for OPTNeuronConfig to refuse.
            on_neuron = instance_type in FAMILIES and FAMILIES[instance_type].on_neuron
            tensor_parallel_size = get_available_cores() if on_neuron else 1
            if tensor_parallel_size == 0 and not INSTALLED:
                raise ValueError(f"instance_type={instance_type!r} needs {NEEDED_FOR_NEURON}.")
            if tensor_parallel_size == 0:
                raise ValueError(
                    f"This host has no NeuronCores to count: give tensor_parallel_size for {instance_type}, for "
                    "example 2."
                )
        if sequence_length is None:
            sequence_length = min(opt_config.max_position_embeddings, LONGEST_DEFAULT_SEQUENCE)
        local = Path(model_name_or_path).is_dir()
        given: dict[str, Any] = {
            **options,
            "batch_size": batch_size,
            "weight_dtype": options.get("weight_dtype") or ("int8" if is_int8(opt_config) else None),
            "checkpoint_id": None if local else str(model_name_or_path),
            "checkpoint_revision": None if local else opt_config._commit_hash,
        }
        neuron_config = OPTNeuronConfig(
            instance_type=instance_type,
            sequence_length=sequence_length,
            tp_degree=tensor_parallel_size,
            **{name: value for name, value in given.items() if value is not None},
        )
        check_model(opt_config, neuron_config)
        return neuron_config

    @classmethod
    def _export(
        cls,
        model_id: str | Path,
        config: PretrainedConfig,
        neuron_config: OPTNeuronConfig,
        token: bool | str | None = None,
        revision: str | None = None,
        load_weights: bool | None = False,
        eager: bool = False,
        force: bool = False,
        tp_processes: int = 1,
        trust_remote_code: bool = False,
        **hub_options: Any,
    ) -> NeuronOPTForCausalLM:
        """What `export` calls: exports to a temporary directory, which lives as long as the model.

        Of `tp_processes` that share the model, one of each host writes it.

        Keep the export with `save_pretrained`. For arguments and errors see `optimum_opt_trn.export.export_opt`; with
        `load_weights` the model can generate at once.
        """
        reject_unknown(hub_options, (*_HUB_OPTIONS, *_IGNORED_OPTIONS), f"{cls.__name__}.export")
        hub = {name: value for name, value in hub_options.items() if name in _HUB_OPTIONS}
        how: dict[str, Any] = {"eager": eager, "force": force}
        made: list[tempfile.TemporaryDirectory] = []  # in the process that exports

        def write() -> Path:
            made.append(tempfile.TemporaryDirectory(prefix="optimum_opt_trn-"))
            output = Path(made[0].name) / "export"
            return export_opt(
                model_id, output, neuron_config, config=config, token=token, revision=revision, **how, **hub
            )

        directory = get_target(neuron_config, tp_processes).once(neuron_config, write)
        how["trust_remote_code"] = trust_remote_code
        model = cls._open(directory, load=bool(load_weights), tp_processes=tp_processes, **how)
        model._temporary = made[0] if made else None
        return model

    @classmethod
    def from_pretrained(cls, model_id: str | Path, **options: Any) -> NeuronOPTForCausalLM:
        """Loads an export; or exports an ordinary OPT checkpoint on the fly, and loads that.

        Args:
            model_id: a local directory or an id on the hub.
            options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` as in transformers;
                `eager=True` to run the graphs uncompiled; `force=True` to go on where memory does not suffice;
                `verify=True` to read every file and compare it with the hash that it was written with;
                `trust_remote_code=True` to load an export for `neuron` that was compiled by somebody else, which
                runs code of it (exports for `cpu` hold none);
                `export=True` to export anew what is an export already, `export=False` to load exports only;
                `tp_processes=N` if N processes, started by `torchrun` or alike, share this model (by default
                each process has a model of its own); and for a checkpoint that is not exported yet, what
                `get_neuron_config` takes (`tp_degree` is another name of `tensor_parallel_size`; `dtype` and
                `torch_dtype` are other names of `amp`).

        Raises:
            TypeError: for an unknown option, naming the nearest.
            ValueError: if the model is not an OPT, or with `export=False` not an export; if it holds code that was
                compiled elsewhere, without `trust_remote_code`; if an option does not suit
                it, or differs from what the export was made with; DoesNotFitError if there is too little memory;
                CheckpointError if files are missing or broken.
            OSError: if there is no such model.
        """
        cls._check_options(options)
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        return cls._from_pretrained(model_id, load_config(model_id, **hub), **options)

    @classmethod
    def _from_pretrained(cls, model_id: str | Path, config: PretrainedConfig, **options: Any) -> NeuronOPTForCausalLM:
        cls._check_options(options)
        config = check_opt(config, model_id)
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        chosen = {_ALIASES.get(k, k): v for k, v in options.items() if k in export_options() and v is not None}
        how: dict[str, Any] = {name: bool(options.get(name)) for name in ("eager", "force", "trust_remote_code")}
        how["tp_processes"] = options.get("tp_processes") or 1
        directory = find_export(model_id, hub)
        if directory is None and options.get("export") is False:
            raise ValueError(
                f"{model_id} is a checkpoint, not an export, and export=False was given: leave that out to export it "
                f"on the fly, or run `optimum-cli export neuron -m {model_id} OUTPUT` and load OUTPUT."
            )
        if directory is not None and not options.get("export"):
            if options.get("verify"):
                verify_checkpoint(directory)
                if unlisted := find_unlisted(directory):
                    logger.warning(
                        f"{directory}: an earlier version recorded no hash of {', '.join(unlisted)}: these were "
                        "not verified. Export the model again to record them."
                    )
            return cls._open(directory, load=True, **how, expected=chosen)
        where = {name: hub[name] for name in ("token", "revision") if name in hub}
        neuron_config = cls.get_neuron_config(model_id, config=config, **where, **chosen)
        return cls._export(model_id, config, neuron_config, load_weights=True, **how, **hub)

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> None:
        known = (
            *_HUB_OPTIONS,
            *_IGNORED_OPTIONS,
            "eager",
            "force",
            "verify",
            "export",
            "tp_processes",
            "trust_remote_code",
            *export_options(),
        )
        reject_unknown(options, known, f"{cls.__name__}.from_pretrained")
        for name in sorted(set(_ALIASES.values())):
            given = {key: v for key, v in options.items() if name == _ALIASES.get(key, key) and v is not None}
            values = {normalize_dtype(value, key) if name == "amp" else value for key, value in given.items()}
            if len(values) > 1:
                listed = " and ".join(f"{key}={value!r}" for key, value in given.items())
                raise ValueError(f"{listed} disagree: give one.")

    @classmethod
    def _open(
        cls,
        directory: Path,
        load: bool,
        eager: bool,
        force: bool,
        tp_processes: int = 1,
        trust_remote_code: bool = False,
        expected: dict[str, Any] | None = None,
    ) -> NeuronOPTForCausalLM:
        """The export in `directory`; `expected` are options that it must have been made with."""
        neuron_config = OPTNeuronConfig.from_pretrained(directory)
        for name, value in (expected or {}).items():
            field = "tp_degree" if name == "tensor_parallel_size" else name
            made = getattr(neuron_config, field)
            if field in ("amp", "kv_cache_dtype"):
                value = normalize_dtype(value, field)
            elif field == "weight_dtype":
                value = normalize_weight_dtype(value, neuron_config.amp)
            elif field == "adapter":
                value = normalize_adapters(value)
            elif isinstance(made, tuple):
                value = tuple(value)
            if value != made:
                raise ValueError(
                    f"{directory} was exported with {field}={made!r}, which cannot be changed to {value!r} on "
                    "loading: leave the option out, or export the model again."
                )
        config = OPTConfig.from_pretrained(directory)
        check_model(config, neuron_config)
        if load:
            check_fit(config, neuron_config, force)
        target = get_target(neuron_config, tp_processes, trust_remote_code)
        runtime = target.load(config, neuron_config, directory, eager) if load else None
        return cls(config, neuron_config, directory, runtime)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the export to `save_directory`, whole or not at all, with the `generation_config` as it is now.

        Where processes share the model, the first one does, and this does nothing in the others.

        Args:
            save_directory: a directory that is not there, is empty, or holds an earlier export.
            push_to_hub: whether to upload it then; `kwargs` are those of `push_to_hub`, with `repository_id`.
            kwargs: `safe_serialization`, which transformers' pipelines pass, can only be True.

        Raises:
            FileExistsError: if `save_directory` holds anything but an export.
            ValueError: for `safe_serialization=False`; TypeError for an unknown option.
        """
        target = Path(save_directory)
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False: an export's weights are safetensors, leave the option out.")
        if not push_to_hub and kwargs:
            reject_unknown(kwargs, ("push_to_hub",), "save_pretrained")
        if self._loaded is not None and not self._loaded.is_first:
            return
        if target.resolve() == self.directory.resolve():
            save_generation_config(target, self.generation_config)
        else:
            copy_export(self.directory, target, self.generation_config)
        if push_to_hub:
            self.push_to_hub(str(target), kwargs.pop("repository_id", target.name), **kwargs)

    def _save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        self.save_pretrained(save_directory, **kwargs)

    def push_to_hub(
        self,
        save_directory: str,
        repository_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: bool | str = True,
        endpoint: str | None = None,
    ) -> str:
        """Uploads the export in `save_directory`; the address of the commit. See `checkpoint.push_to_hub`."""
        return push_to_hub(
            save_directory, repository_id, private=private, revision=revision, token=token, endpoint=endpoint
        )

    @classmethod
    def _get_neuron_config(
        cls,
        checkpoint_id: str | None,
        checkpoint_revision: str | None,
        instance_type: str,
        batch_size: int,
        sequence_length: int,
        tensor_parallel_size: int,
        dtype: torch.dtype,
    ) -> OPTNeuronConfig:
        """What the auto class calls, which knows only Neuron devices."""
        return OPTNeuronConfig(
            batch_size=batch_size,
            sequence_length=sequence_length,
            tp_degree=tensor_parallel_size,
            amp="f16" if dtype == torch.float32 else normalize_dtype(dtype),
            instance_type=instance_type,
            checkpoint_id=checkpoint_id,
            checkpoint_revision=checkpoint_revision,
        )


def _generation_config(directory: Path, config: OPTConfig) -> GenerationConfig:
    file = directory / GENERATION_CONFIG_NAME
    if not file.is_file():
        logger.warning(f"{directory} has no {GENERATION_CONFIG_NAME}: generate() has the defaults of config.json.")
        return GenerationConfig.from_model_config(config)
    try:
        generation_config = GenerationConfig.from_pretrained(directory)
        check_tokens(generation_config.to_dict(), str(file))
        return generation_config
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): correct it, or remove it for the defaults of config.json."
        ) from error


def export_options() -> tuple[str, ...]:
    """The options of `from_pretrained` that go to `get_neuron_config`, and other names of them."""
    return tuple({*OPTNeuronConfig.export_options(), *_ALIASES, *_ALIASES.values()})
