"""Meta's OPT models on AWS Trainium and Inferentia2, and on any CPU: a plugin backend for Hugging Face Optimum."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compat.optimum_neuron import install as _install
from .version import __version__


if TYPE_CHECKING:
    from .checkpoint import CheckpointError, save_pretrained_split
    from .configuration_opt import OPTNeuronConfig
    from .modeling_neuron_opt import NeuronOPTForCausalLM
    from .pipelines import pipeline
    from .planning.memory import DoesNotFitError

# Public name -> the module that has it, which is imported at first use.
_EXPORTS = {
    "CheckpointError": "checkpoint",
    "NeuronOPTForCausalLM": "modeling_neuron_opt",
    "DoesNotFitError": "planning.memory",
    "OPTNeuronConfig": "configuration_opt",
    "pipeline": "pipelines",
    "save_pretrained_split": "checkpoint",
}

__all__ = [
    "CheckpointError",
    "DoesNotFitError",
    "NeuronOPTForCausalLM",
    "OPTNeuronConfig",
    "__version__",
    "pipeline",
    "save_pretrained_split",
]


# From here on optimum.neuron.NeuronModelForCausalLM knows OPT.
_install()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
