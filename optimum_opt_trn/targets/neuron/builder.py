"""neuronx-distributed: tracing and compiling with its older ModelBuilder, and loading what that saved.

The only file that names NxD or torch_neuronx. `ModelBuilder` and `BaseModelInstance` of `trace/model_builder.py` are
the same from NxD 0.15 to 0.18, and what optimum-neuron 0.4.5 runs on hardware (its
models/inference/backend/pretrained_model.py).
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch_neuronx  # noqa: F401  registers torch.ops.neuron and torch.classes.neuron
from neuronx_distributed.parallel_layers import mappings
from neuronx_distributed.trace.model_builder import BaseModelInstance, ModelBuilder
from optimum.neuron.cache.entries.single_model import SingleModelCacheEntry
from optimum.neuron.cache.hub_cache import hub_neuronx_cache
from optimum.neuron.utils.version_utils import get_neuronxcc_version
from torch import Tensor, nn
from torch_neuronx.xla_impl.ops import TopK, xla_hlo_call
from transformers import OPTConfig

from ...configuration_opt import OPTNeuronConfig
from ...hardware import FAMILIES
from ..base import TargetError
from .allocator import large_blocks_return
from .rank_module import VISIBLE_RESULTS, DeviceOperators, RankModule, example_inputs


# optimum-neuron's own decoders are compiled with these (0.4.5, models/inference/backend/modules/decoder/
# modeling_decoder.py, get_compiler_args). neuronx-cc would otherwise cast float32 to bf16 (--auto-cast). NxD adds
# --enable-saturate-infinity if it is given no arguments (trace/model_builder.py, append_default_compiler_flags).
COMPILER_ARGUMENTS = (
    "--auto-cast=none --model-type=transformer --enable-saturate-infinity "
    "--tensorizer-options='--enable-ccop-compute-overlap --cc-pipeline-tiling-factor=2 --vectorize-strided-dma '"
)

# -O1 cuts a graph into modules, which compiles faster; the threshold has every such graph cut. Decoding is spared the
# calls between modules by -O2. All as in NxD Inference (models/model_wrapper.py).
CONTEXT_ARGUMENTS = "-O1 --internal-hlo2tensorizer-options='--modular-flow-mac-threshold=10 '"
DECODING_ARGUMENTS = "-O2"

# Where NxD compiles, if it is to be kept: optimum-neuron's variable (backend/pretrained_model.py, get_builder).
WORKDIR_VARIABLE = "BASE_COMPILE_WORK_DIR"


def compiler_arguments(neuron_config: OPTNeuronConfig, graph: str) -> str:
    """What neuronx-cc is called with for a graph."""
    family = FAMILIES[neuron_config.instance_type]
    own = CONTEXT_ARGUMENTS if graph == "context_encoding" else DECODING_ARGUMENTS
    return f"{COMPILER_ARGUMENTS} {own} --lnc={family.physical_cores} --target {family.target}"


def versions() -> dict[str, str]:
    """What a compiled model depends on."""
    return {"neuronxcc": get_neuronxcc_version(), "neuronx_distributed": metadata.version("neuronx_distributed")}


@xla_hlo_call
def _dynamic_update_slice(cache: Any, new: Any, *start: Any) -> Any:
    return cache.dtype[cache.sizes].DynamicUpdateSlice(cache, new, *start)


def put_slot(cache: Tensor, new: Tensor, slot: Tensor) -> Tensor:
    """See `DeviceOperators`. For a write to a slice, XLA would pad and select the whole cache."""
    zero = (slot - slot).squeeze(0)
    return _dynamic_update_slice(cache, new, slot.squeeze(0), zero, zero, zero)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `DeviceOperators`. The SDK's operator, called as in NxD's operators/topk.py; torch.topk would be a sort."""
    best, places = TopK.apply(x, k, dim=1)
    return best, places


class _Instance(BaseModelInstance):
    """Tells the builder which results are which states."""

    def get(self, bucket_rank: int, **kwargs: Any) -> tuple[nn.Module, dict[Tensor, int]]:
        # Called before each graph is traced. What the tracer copied for the last one can be in reference cycles.
        gc.collect()
        states = enumerate(self.module.states)
        return self.module, {self.module.get_parameter(name): VISIBLE_RESULTS + index for index, name in states}


def make_builder(
    config: OPTConfig,
    neuron_config: OPTNeuronConfig,
    shapes: dict[str, tuple[torch.Size, torch.dtype]],
    workdir: Path,
) -> ModelBuilder:
    """NxD's builder with every graph added; for the arguments see `RankModule`."""
    builder = ModelBuilder(
        router=None,
        tp_degree=neuron_config.tp_degree,
        checkpoint_loader=None,
        # NxD joins paths to it, and removes what is there.
        compiler_workdir=os.path.join(workdir, ""),
        logical_nc_config=FAMILIES[neuron_config.instance_type].physical_cores,
    )
    operators = DeviceOperators(
        mappings.reduce_from_tensor_model_parallel_region,
        mappings.gather_from_tensor_model_parallel_region,
        put_slot,
        top_k,
    )
    instances: list[_Instance] = []

    def make(graph: str) -> nn.Module:
        # The builder traces graph after graph, and needs no module after that: it loads no weights here. One module
        # is in memory at a time.
        for instance in instances:
            instance.module = None
        return RankModule(graph, config, neuron_config, shapes, operators).eval()

    for graph, examples in example_inputs(config, neuron_config).items():
        instances.append(_Instance(partial(make, graph), input_output_aliases={}))
        # No priority_model_idx: without a layout that the compiler chose for one graph, weights can be streamed.
        builder.add(
            key=graph,
            model_instance=instances[-1],
            example_inputs=examples,
            compiler_args=compiler_arguments(neuron_config, graph),
        )
    return builder


def compile_model(
    config: OPTConfig,
    neuron_config: OPTNeuronConfig,
    shapes: dict[str, tuple[torch.Size, torch.dtype]],
    file: Path,
) -> None:
    """Compiles all graphs, for which no device is needed, and saves them without weights to `file`.

    Raises:
        TargetError: if the compiler refuses a graph.
    """
    entry = None
    if neuron_config.checkpoint_id is not None:
        entry = SingleModelCacheEntry(neuron_config.checkpoint_id, "text-generation", config, neuron_config)
    variables = {
        # What the compiler's target follows; optimum.neuron.utils.instance.align_compilation_target sets it as well.
        "NEURON_PLATFORM_TARGET_OVERRIDE": str(neuron_config.target),
        # NxD 0.15 wants it for four ranks on this hardware; 0.18 has this default (parallel_layers/parallel_state.py).
        "LOCAL_WORLD_SIZE": str(neuron_config.tp_degree),
    }
    with _workdir() as workdir, _environment(**variables), large_blocks_return():
        builder = make_builder(config, neuron_config, shapes, workdir / "graphs")
        try:
            with hub_neuronx_cache(entry=entry):
                traced = builder.trace(initialize_model_weights=False)
        except RuntimeError as error:
            raise TargetError(
                f"The model could not be compiled for {neuron_config.instance_type} ({error}). Set {WORKDIR_VARIABLE} "
                "to a directory and try again: it keeps the graphs and the compiler's log-neuron-cc.txt. If memory "
                "ran out, compile on a larger host and copy the export (docs/neuron.md)."
            ) from error
        torch.jit.save(traced, file)


def load_model(file: Path, parts: Iterable[list[dict[str, Tensor]]], ranks: int) -> torch.jit.ScriptModule:
    """The model in `file`, its weights on the cores and its caches allocated there.

    NxD's own `initialize` wants all weights of all ranks in host memory. What it does with them, `_parallel_load` and
    `initialize_with_saved_weights` (trace/spmd.py, NxDModel), can be had piece by piece.

    Args:
        parts: the weights, a dictionary for each rank at a time; see `parameters_of`. One part at a time is made
            contiguous.
    """
    model = torch.jit.load(str(file))
    placed: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for part in parts:
        staged = [{name: tensor.contiguous() for name, tensor in tensors.items()} for tensors in part]
        for on_core, tensors in zip(placed, torch.ops.neuron._parallel_load(staged), strict=True):
            on_core.update(tensors)
        del part, staged  # before the next is made
    model.nxd_model.weights = placed
    model.nxd_model.initialize_with_saved_weights(torch.tensor([0], dtype=torch.int32))
    return model


@contextmanager
def _workdir() -> Iterator[Path]:
    kept = os.environ.get(WORKDIR_VARIABLE)
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory(prefix="optimum_opt_trn-") as directory:
        yield Path(directory)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
