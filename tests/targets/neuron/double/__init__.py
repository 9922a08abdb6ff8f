"""A small stand-in for what the package uses of the Neuron SDK, which runs the ranks on the host.

`install()` makes the SDK importable as fake_sdk does, and puts what is here in its place. To be called first thing, in
a process started for the purpose. What it cannot tell: anything about neuronx-cc or the devices. The names and
parameters of what it stands in for are in `signatures.py`, and checked there against the public sources.
"""

import sys
from pathlib import Path


VERSIONS = {"neuronx_distributed": "0.15.22404", "neuronxcc": "2.21.18209"}


def install() -> None:
    sys.path.insert(0, str(Path(__file__).parents[3] / "support"))
    import fake_sdk
    import neuronx_distributed.parallel_layers
    import neuronx_distributed.trace
    import neuronxcc
    import torch_neuronx.xla_impl

    from . import compile_cache, mappings, model_builder, operators, runtime  # noqa: F401

    sys.modules["libneuronxla.neuron_cc_cache"] = compile_cache
    sys.modules["neuronx_distributed.trace.model_builder"] = neuronx_distributed.trace.model_builder = model_builder
    sys.modules["neuronx_distributed.parallel_layers.mappings"] = mappings
    neuronx_distributed.parallel_layers.mappings = mappings
    sys.modules["torch_neuronx.xla_impl.ops"] = torch_neuronx.xla_impl.ops = operators
    neuronxcc.__version__ = VERSIONS["neuronxcc"]
    fake_sdk.Distribution.versions.update(VERSIONS)
