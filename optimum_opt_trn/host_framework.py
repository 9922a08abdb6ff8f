"""What this package takes from optimum-neuron, and what stands in its place where that is not installed.

optimum-neuron 0.4.5 is for Python 3.10 and 3.11, transformers 4.57 and optimum 2.0. The `neuron` target needs it; `cpu`
needs nothing of it. Whether it is there is found out here, once.

| name here | with optimum-neuron | without (`without_optimum_neuron.py`) |
|---|---|---|
| `NeuronModelForCausalLM` | its class: its auto class and its callers take our model | a class on optimum's `OptimizedModel` with the same interface |
| `NeuronConfig`, `register_neuron_config` | its class and its registry | a base that reads and writes neuron_config.json; no registry |
| `optimum_neuron_version`, `get_neuronxcc_version` | the versions that neuron_config.json records | None; ImportError |
| `is_neuronx_available`, `get_neuron_major`, `get_instance_name`, `get_available_cores` | what it finds out about the Neuron SDK and devices | no SDK, no device |

A file that one side wrote loads on the other: `OPTNeuronConfig` ignores the recorded versions.
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import requires, version
from typing import Any

from packaging.requirements import Requirement


INSTALLED = importlib.util.find_spec("optimum.neuron") is not None

# Name -> where optimum-neuron has it. Imported when it is first asked for: optimum-neuron may be what imports us.
_TAKEN = {
    "NEURON_CONFIG_NAME": "optimum.neuron.configuration_utils",
    "NeuronConfig": "optimum.neuron.configuration_utils",
    "NeuronModelForCausalLM": "optimum.neuron",
    "get_available_cores": "optimum.neuron.utils.system",
    "get_instance_name": "optimum.neuron.utils.system",
    "get_neuron_major": "optimum.neuron.utils.system",
    "get_neuronxcc_version": "optimum.neuron.utils.version_utils",
    "is_neuronx_available": "optimum.neuron.utils.import_utils",
    "optimum_neuron_version": "optimum.neuron.version",
    "register_neuron_config": "optimum.neuron.configuration_utils",
}
# The names that differ there.
_ITS_NAMES = {"optimum_neuron_version": "__version__"}


@contextmanager
def without_alarm() -> Iterator[None]:
    """Drops what optimum-neuron says at its import on a host without Neuron devices, where `cpu` needs none."""
    system = logging.getLogger("optimum.neuron.utils.system")

    def other(record: logging.LogRecord) -> bool:
        return "No major for neuron device" not in record.getMessage()

    system.addFilter(other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It seems this is running on a CPU-only machine")
            yield
    finally:
        system.removeFilter(other)


def __getattr__(name: str) -> Any:
    if name not in _TAKEN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if INSTALLED:
        with without_alarm():
            return getattr(import_module(_TAKEN[name]), _ITS_NAMES.get(name, name))
    return getattr(import_module(".without_optimum_neuron", __package__), name)


def check_versions() -> None:
    """Raises ImportError if the optimum-neuron that is installed does not work with the libraries installed with it.

    pip refuses such a combination, but does not see what `--no-deps` or a later upgrade brings.
    """
    for text in requires("optimum-neuron") or ():
        need = Requirement(text)
        if need.name not in ("transformers", "optimum") or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found = version(need.name)
        if not need.specifier.contains(found, prereleases=True):
            wanted = f"{need.name}{need.specifier}"
            raise ImportError(
                f"optimum-neuron {version('optimum-neuron')} needs {wanted}, and {found} is installed: run "
                f"`pip install '{wanted}'`; or, if you need `cpu` only, `pip uninstall optimum-neuron`."
            )


if INSTALLED:
    check_versions()
