"""Registers OPT with optimum-neuron, on hosts with and without the Neuron SDK.

After `import optimum_opt_trn`, `optimum.neuron.NeuronModelForCausalLM` knows OPT. Importing this package must be silent
and fast. Importing optimum-neuron is neither, so nothing of it is imported here: `install` patches three of its modules
when somebody imports them (or at once, if they are imported already). The patches concern only OPT, and the SDK is
neither needed nor imitated:

| module | patch | reason |
|---|---|---|
| `optimum.neuron.configuration_utils` | `OPTNeuronConfig` is registered, and reads its own dictionaries | the generic `NeuronConfig.from_pretrained` looks up a class by the name in neuron_config.json, but first refuses files that another version of itself or of the compiler wrote; for OPT, the format version and the manifest decide |
| `optimum.neuron.models.auto_model` | `has_neuron_model_class` answers for OPT, and registers our model | the original first imports all models of optimum-neuron, which needs the SDK |
| `optimum.neuron.models.inference.modeling_utils` | `get_neuron_config` of the auto classes calls our class for an OPT | the original refuses `cpu`, chooses 0 ranks on a host without NeuronCores, and knows neither `amp` nor `kv_cache_dtype` |
"""  # noqa: E501

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


REGISTRY_KEY = ("opt", "text-generation", "inference")


def install() -> None:
    """Patches the modules named above, now or after their import. Safe to call again."""
    if any(isinstance(finder, _PatchAfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _PatchAfterImport())
    for name, patch in _PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])


def _register_configuration(module: ModuleType) -> None:
    importlib.import_module("optimum_opt_trn.configuration_opt")
    base = module.NeuronConfig
    original = base.from_dict.__func__

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any]) -> Any:
        if cls is base and config_dict.get("_serialized_key") == "OPTNeuronConfig":
            # Not at the top: that module may be importing this one.
            from ..configuration_opt import OPTNeuronConfig

            return OPTNeuronConfig.from_dict(config_dict)
        return original(cls, config_dict)

    base.from_dict = classmethod(from_dict)


def _answer_for_opt(module: ModuleType) -> None:
    original = module.has_neuron_model_class

    @functools.wraps(original)
    def has_neuron_model_class(model_type: str, task: str, mode: str) -> bool:
        if (model_type, task, mode) == REGISTRY_KEY:
            from ..modeling_neuron_opt import NeuronOPTForCausalLM

            module.register_neuron_model(*REGISTRY_KEY)(NeuronOPTForCausalLM)
            return True
        return original(model_type, task, mode)

    module.has_neuron_model_class = has_neuron_model_class  # type: ignore[attr-defined]


def _pass_opt_on(module: ModuleType) -> None:
    base = module.NeuronPreTrainedModel
    original = base.get_neuron_config.__func__

    @functools.wraps(original)
    def get_neuron_config(
        cls: Any,
        model_name_or_path: Any,
        config: Any = None,
        token: bool | str | None = None,
        revision: str | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        if inspect.isabstract(cls) and cls.task == "text-generation":
            source = config
            if source is None:
                from transformers import AutoConfig

                source = AutoConfig.from_pretrained(model_name_or_path, token=token, revision=revision)
            if source.model_type == "opt":
                cls, config = cls._get_neuron_model_class(source), source
                return cls.get_neuron_config(model_name_or_path, config, token, revision, *args, **options)
        return original(cls, model_name_or_path, config, token, revision, *args, **options)

    base.get_neuron_config = classmethod(get_neuron_config)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "optimum.neuron.configuration_utils": _register_configuration,
    "optimum.neuron.models.auto_model": _answer_for_opt,
    "optimum.neuron.models.inference.modeling_utils": _pass_opt_on,
}


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules in `_PATCHES` as Python does, and patches each after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = _PATCHES.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec
