"""The names of `host_framework.py` where optimum-neuron is not installed: enough of them for the `cpu` target."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, NoReturn

import torch
from optimum.modeling_base import OptimizedModel
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from .version import NEEDED_FOR_NEURON


NEURON_CONFIG_NAME = "neuron_config.json"

optimum_neuron_version = None


def get_neuronxcc_version() -> NoReturn:
    raise ModuleNotFoundError(f"The Neuron compiler needs {NEEDED_FOR_NEURON}.")


def is_neuronx_available() -> bool:
    return False


def get_neuron_major() -> int:
    """The major number of the Neuron driver's devices; -1 for none."""
    return -1


def get_instance_name() -> NoReturn:
    raise RuntimeError(f"Neuron devices need {NEEDED_FOR_NEURON}.")


def get_available_cores() -> int:
    return 0


def register_neuron_config(cls: type) -> type:
    return cls


class NeuronConfig:
    """A configuration that is stored as neuron_config.json.

    A subclass defines `to_json_string` and `from_dict`.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> NeuronConfig:
        raise NotImplementedError

    def to_json_string(self) -> str:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike,
        config_file_name: str | None = None,
        token: str | bool | None = None,
        revision: str = "main",
    ) -> NeuronConfig:
        """Reads the file from a local directory or from the hub.

        Raises:
            OSError: if there is no such file, or if it is not JSON.
        """
        name = config_file_name or NEURON_CONFIG_NAME
        path = cached_file(pretrained_model_name, name, token=token, revision=revision)
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path} is not a JSON file: {error}.") from error
        return cls.from_dict(values)

    def save_pretrained(self, save_directory: str | os.PathLike, config_file_name: str | None = None) -> None:
        """Writes the file to `save_directory`, which is created if it does not exist."""
        os.makedirs(save_directory, exist_ok=True)
        self.to_json_file(Path(save_directory) / (config_file_name or NEURON_CONFIG_NAME))

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")


class NeuronModelForCausalLM(OptimizedModel):
    """The part of optimum-neuron's interface of a model that the subclass does not define."""

    task = "text-generation"
    device = torch.device("cpu")

    def to(self, device: str | torch.device) -> None:
        """Raises ValueError for a device other than the host."""
        kind = torch.device(device).type
        if kind != "cpu":
            raise ValueError(f"Neuron models cannot be moved to {kind}.")

    @classmethod
    def export(
        cls,
        model_id: str | Path,
        neuron_config: NeuronConfig,
        config: PretrainedConfig | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        load_weights: bool | None = False,
        **kwargs: Any,
    ) -> NeuronModelForCausalLM:
        """Exports the checkpoint `model_id` for `neuron_config`. For `kwargs` see `_export` of the subclass."""
        where = {"token": token, "revision": revision}
        if config is None:
            config = AutoConfig.from_pretrained(model_id, **where)
        return cls._export(model_id, config, neuron_config, load_weights=load_weights, **where, **kwargs)

    @classmethod
    @abstractmethod
    def _export(cls, model_id: str | Path, config: PretrainedConfig, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
