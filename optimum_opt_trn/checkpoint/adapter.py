"""LoRA adapters of PEFT, merged into the weights while they are read: a matrix at a time, in float32.

A LoRA (Hu et al., 2021) adds `scale * B @ A` to a matrix, with `scale = alpha / r`, or `alpha / sqrt(r)` for rsLoRA
(Kalajdzievski, 2023). Names, files and options are those of PEFT's `LoraConfig` and `save_pretrained`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..configuration_opt import split_adapter
from .formats import open_file
from .layout import CheckpointError, FileSpecs, canonical_name
from .listing import sha256_file


CONFIG_FILE, WEIGHT_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

_PEFT_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B")
_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# Settings of PEFT that say how an adapter was trained, or that are read here. Any other that is set is refused: it may
# change what the adapter computes.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"),
    *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
# With others of PEFT's, the base model's weights were changed before the training.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_WAY_OUT = "Merge it with PEFT's merge_and_unload(), save the result, and export that."


class Adapter:
    """A LoRA adapter that can be merged.

    Args:
        directory: has the files that PEFT writes.
        origin: what messages call it.
        weight: what it is multiplied with.

    Raises:
        CheckpointError: if files are missing or broken, or if it has what cannot be merged, by name.
    """

    def __init__(self, directory: Path, origin: str, weight: float = 1.0):
        self.origin, self.weight = origin, weight
        self._config = _read_config(directory / CONFIG_FILE, origin)
        file = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"The adapter {origin} has no weights: expected {' or '.join(WEIGHT_FILES)}.")
        # Changes when the adapter or its weight does.
        self.identity = " ".join([*map(sha256_file, (directory / CONFIG_FILE, file)), str(weight)])
        # The module, as PEFT calls it -> "lora_A" and "lora_B" -> reads it.
        self._modules: dict[str, dict[str, Callable[[], Tensor]]] = {}
        try:
            readers = open_file(file)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is broken or not an adapter's ({error}).") from error
        for name, read in readers.items():
            module, part = _parsed(name, origin)
            self._modules.setdefault(module, {})[part] = read
        # Our name of a weight -> the module.
        self._names = {f"{canonical_name(module)}.weight": module for module in self._modules}

    def check(self, files: FileSpecs) -> None:
        """Raises CheckpointError unless it fits a model of these tensors."""
        specs = {name: spec for tensors in files.values() for name, spec in tensors.items()}
        for name, module in self._names.items():
            if name not in specs:
                raise CheckpointError(
                    f"The adapter {self.origin} is for another model: its {module} is not in this one."
                )
            if missing := [part for part in _PARTS if part not in self._modules[module]]:
                raise CheckpointError(f"The adapter {self.origin} lacks the {missing[0]} of {module}.")
            a, b = (self._modules[module][part]() for part in _PARTS)
            rows, columns = specs[name].shape
            if a.ndim != 2 or b.ndim != 2 or (b.shape[0], b.shape[1], a.shape[1]) != (rows, a.shape[0], columns):
                raise CheckpointError(
                    f"The adapter {self.origin} is for another model: {module} is {(rows, columns)}, and its matrices "
                    f"are {tuple(b.shape)} and {tuple(a.shape)}."
                )

    def changes(self, name: str) -> bool:
        """Whether it has something to add to this tensor of ours."""
        return name in self._names

    def adder(self, name: str) -> Callable[[Tensor, int], object]:
        """Reads its matrices for a tensor that it changes, and returns what adds their product to rows of the tensor.

        That is called with float32 rows `(n, in)`, which it changes, and the index of the first one in the tensor.
        """
        module = self._names[name]
        a, b = (self._modules[module][part]() for part in _PARTS)
        scale, a = self._scale(module, len(a)) * self.weight, a.float()
        # In place: no other matrix of this size is made.
        return lambda rows, start: rows.addmm_(b[start : start + len(rows)].float(), a, alpha=scale)

    def _scale(self, module: str, rank: int) -> float:
        alpha = float(self._config["lora_alpha"])
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def open_adapters(names: Sequence[str], files: FileSpecs, **hub: Any) -> list[Adapter]:
    """The adapters to merge into a model.

    Args:
        names: a directory or an id on the hub each, with a weight behind it where that is not 1 (`DIR=0.5`).
        files: what the model consists of.
        hub: token, cache_dir, force_download, local_files_only, as in transformers.

    Raises:
        CheckpointError: if one cannot be merged, or does not fit the model.
        OSError: if there is no such directory and no such id.
    """
    adapters = []
    for text in names:
        name, weight = split_adapter(text)
        directory = Path(name)
        if not directory.is_dir():
            try:
                directory = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, *WEIGHT_FILES], **hub))
            except (HFValidationError, OSError) as error:
                raise OSError(
                    f"The adapter {name} is not a local directory, and cannot be fetched from the hub: {error}"
                ) from error
        adapter = Adapter(directory, name, weight)
        adapter.check(files)
        adapters.append(adapter)
    return adapters


def _read_config(file: Path, origin: str) -> dict[str, Any]:
    """The settings in adapter_config.json, if it is an adapter that can be merged; see `Adapter`."""
    try:
        config = json.loads(file.read_text())
        kind = config["peft_type"]
        patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
        numbers = [config["lora_alpha"], *patterns.values()] if kind == "LORA" else []
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("alpha is not a number")
        for pattern in patterns:
            re.compile(pattern)
    except FileNotFoundError as error:
        raise CheckpointError(f"{origin} has no {CONFIG_FILE}: it is not an adapter of PEFT.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error, RecursionError) as error:
        raise CheckpointError(f"The adapter {origin} has a broken {CONFIG_FILE} ({error!r}).") from error
    if kind != "LORA":
        raise CheckpointError(f"The adapter {origin} is of type {kind}, and only LORA can be merged.")
    if config.get("use_dora"):
        raise CheckpointError(f"The adapter {origin} is a DoRA (use_dora), which is not merged here. {_WAY_OUT}")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"The adapter {origin} was made with init_lora_weights={start!r}, which changes the base model's weights, "
            f"and is not merged here. {_WAY_OUT}"
        )
    others = {name: value for name, value in config.items() if name not in _KNOWN and value}
    if config.get("bias", "none") != "none":
        others["bias"] = config["bias"]
    for name, value in others.items():
        raise CheckpointError(f"The adapter {origin} has {name}={value!r}, which is not merged here. {_WAY_OUT}")
    settings: dict[str, Any] = config
    return settings


def _parsed(name: str, origin: str) -> tuple[str, str]:
    """The module and the part of a tensor of an adapter: `base_model.model.MODULE.lora_A.weight`."""
    match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name.removeprefix(_PEFT_PREFIX))
    if match is None or not re.search(rf"decoder\.layers\.\d+\..*({'|'.join(_MODULES)})$", match[1]):
        raise CheckpointError(
            f"The adapter {origin} has {name}, and only matrices of attention and MLP are merged "
            f"({', '.join(_MODULES)}). {_WAY_OUT}"
        )
    return match[1], match[2]
