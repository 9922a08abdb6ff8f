"""How OPT gets into optimum-neuron's registries, on hosts with and without the Neuron SDK.

After `import optimum_opt_trn`, `optimum.neuron.NeuronModelForCausalLM` knows OPT. That import must stay silent and
cheap, and optimum-neuron's own is neither, so nothing of it is imported here: `install` arranges that three of its
modules are amended as soon as somebody imports them (at once, if that has happened already). The amendments concern
OPT alone, and the SDK is neither needed nor faked:

| module | amendment | why |
|---|---|---|
| `optimum.neuron.configuration_utils` | `OPTNeuronConfig` is registered, and reads its own dictionaries | the generic `NeuronConfig.from_pretrained` looks a class up by the name in neuron_config.json, but first refuses what another version of itself or of the compiler wrote; for ours, the format version and the manifest decide |
| `optimum.neuron.models.auto_model` | `has_neuron_model_class` answers for OPT, and registers our model | the original imports all of optimum-neuron's models first, which takes the SDK |
| `optimum.neuron.models.inference.modeling_utils` | `get_neuron_config` of the auto classes passes an OPT model on to our class | the original turns `cpu` down, chooses 0 ranks where there is no NeuronCore, and knows neither `amp` nor `kv_cache_dtype` |
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
    """Amends the modules named above, now or after their import. Safe to call again."""
    if any(isinstance(finder, _AmendAfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AmendAfterImport())
    for name, amend in _AMENDMENTS.items():
        if name in sys.modules:
            amend(sys.modules[name])


def _register_configuration(module: ModuleType) -> None:
    importlib.import_module("optimum_opt_trn.configuration_opt")
    base = module.NeuronConfig
    original = base.from_dict.__func__

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any]) -> Any:
        if cls is base and config_dict.get("_serialized_key") == "OPTNeuronConfig":
            # Not above: that module may be what is importing this one.
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


_AMENDMENTS: dict[str, Callable[[ModuleType], None]] = {
    "optimum.neuron.configuration_utils": _register_configuration,
    "optimum.neuron.models.auto_model": _answer_for_opt,
    "optimum.neuron.models.inference.modeling_utils": _pass_opt_on,
}


class _AmendAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules in `_AMENDMENTS` as Python would, and amends each after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        amend = _AMENDMENTS.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if amend else None
        if amend is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_amend(module: ModuleType) -> None:
            execute(module)
            amend(module)

        spec.loader.exec_module = execute_and_amend  # type: ignore[method-assign]
        return spec
