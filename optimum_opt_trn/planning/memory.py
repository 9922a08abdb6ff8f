"""The memory plan: what a model takes on each core, from its config.json alone, and what fits.

Weights and cache are exact: the tensors of `checkpoint/layout.py`, cut over ranks as `model/shapes.py` says, which has
the cache's shape too. Workspace is the rank program's tensors (`workspace.py`). What the Neuron runtime takes for
itself is a calibrated constant. See docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

from ..checkpoint.layout import TensorSpec, layer_prefix, layer_specs, outer_specs
from ..hardware import INSTANCES, GiB, Instance, equal_degrees
from ..model.shapes import ModelShape, cache_shape, shard_dim, shard_range
from .host import host_threads
from .setup import Setup
from .workspace import CPU_THREAD_BYTES, graph_workspace, prompt_scores


# What a core's runtime, code and DMA rings take. Calibrated: OPT-13B in float16 at 2048 positions on the two cores of
# a trn1.2xlarge runs at batch size 2 and does not at 3. That holds for any reserve of 0.65 to 1.93 GiB; of 1.13 to
# 1.43 GiB it holds whether or not scores are counted and pages are filled (docs/memory.md). 96 MiB of it are a core's
# microcode (AWS Neuron documentation, "Neuron Device Memory").
NEURON_RESERVE = 5 * GiB // 4

# The runtime shares one scratchpad among all graphs, of as many pages as the largest needs (same page).
SCRATCHPAD_PAGE = GiB // 2

GROUPS = ("attention", "mlp", "embeddings and head", "positions, layernorms")


@dataclass(frozen=True)
class RankTensor:
    """A weight as a rank has it.

    Args:
        name: as in the checkpoint; a layer's as in the first layer.
        shape: of the rank's shard, padding included; every rank's is the same.
        bytes: of it, with the scales of `int8`.
        copied: every rank has the whole tensor.
        count: how many alike there are, one in each layer.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    copied: bool
    count: int

    @property
    def group(self) -> str:
        """One of GROUPS."""
        if "layer_norm" in self.name or "embed_positions" in self.name:
            return GROUPS[3]
        if "self_attn" in self.name:
            return GROUPS[0]
        return GROUPS[1] if ".fc" in self.name else GROUPS[2]


def rank_tensors(config: ModelShape, setup: Setup) -> Iterator[RankTensor]:
    """Every weight of the model, as one of `setup.tp_degree` ranks has it; those of a layer once for all layers."""
    layer = {layer_prefix(0) + name: spec for name, spec in layer_specs(config, setup.stored_amp).items()}
    for specs, count in ((outer_specs(config, setup.stored_amp), 1), (layer, config.num_hidden_layers)):
        for name, spec in specs.items():
            dim, shape = shard_dim(name), list(spec.shape)
            if dim is not None:
                start, stop, padding = shard_range(shape[dim], 0, setup.tp_degree)
                shape[dim] = stop - start + padding
            shard = TensorSpec(tuple(shape), spec.dtype)
            yield RankTensor(name, shard.shape, _tensor_bytes(shard, setup), dim is None, count)


def _tensor_bytes(spec: TensorSpec, setup: Setup) -> int:
    if setup.amp == "int8" and spec.dtype == setup.stored_amp and len(spec.shape) == 2:
        elements, scales = TensorSpec(spec.shape, "int8"), TensorSpec(spec.shape[:1], "f32")
        return elements.bytes + scales.bytes
    return spec.bytes


def checkpoint_bytes(config: ModelShape, setup: Setup) -> tuple[int, int]:
    """Bytes of the split checkpoint's tensors: of all its files, and of the largest one."""
    outer, layer = (
        sum(_tensor_bytes(spec, setup) for spec in specs.values())
        for specs in (outer_specs(config, setup.stored_amp), layer_specs(config, setup.stored_amp))
    )
    return outer + config.num_hidden_layers * layer, max(outer, layer)


@dataclass(frozen=True)
class MemoryPlan:
    """What goes where on one core; on `cpu`, in the process that holds all ranks.

    Args:
        instance, setup: what it was made for.
        weights: bytes, for each of GROUPS.
        cache: bytes of keys and values, all layers.
        graphs: bytes of workspace of each graph at its widest moment.
        workspace: bytes set aside for it, once for all graphs.
        reserve: bytes of runtime and code; on `cpu` of the buffers that threads have.
        scores: bytes that the scores of a prompt would add to the workspace, if the compiler did not tile them.
    """

    instance: Instance
    setup: Setup
    weights: dict[str, int]
    cache: int
    graphs: dict[str, int]
    workspace: int
    reserve: int
    scores: int = 0

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.cache + self.workspace + self.reserve

    @property
    def free(self) -> int:
        """What remains of the core's memory; negative where it does not fit."""
        return self.instance.core_bytes - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def runs(self) -> bool:
        """Whether it can run at all. On `cpu` weights are mapped files, which may be read again from the disk."""
        mapped = 0 if self.instance.on_neuron else sum(self.weights.values())
        return self.free + mapped >= 0


def plan_memory(config: ModelShape, setup: Setup, instance: Instance) -> MemoryPlan:
    """The plan of `setup` for each core of `instance`."""
    # One process on cpu has every rank's shards, and once what ranks only have copies of.
    ranks = 1 if instance.on_neuron else setup.tp_degree
    weights = dict.fromkeys(GROUPS, 0)
    for tensor in rank_tensors(config, setup):
        weights[tensor.group] += tensor.bytes * tensor.count * (1 if tensor.copied else ranks)
    cache = 2 * config.num_hidden_layers * prod(cache_shape(config, setup)) * setup.cache_bytes * ranks
    graphs = graph_workspace(config, setup, instance.on_neuron)
    workspace = max(graphs.values())
    if not instance.on_neuron:
        return MemoryPlan(instance, setup, weights, cache, graphs, workspace, host_threads() * CPU_THREAD_BYTES)
    pages = -(-workspace // SCRATCHPAD_PAGE)
    scores = prompt_scores(config, setup)
    return MemoryPlan(instance, setup, weights, cache, graphs, pages * SCRATCHPAD_PAGE, NEURON_RESERVE, scores)


def tp_degrees(config: ModelShape, instance: Instance) -> tuple[int, ...]:
    """The degrees that `instance` supports and that split the model's heads and MLP into equal parts."""
    return equal_degrees(config.num_attention_heads, config.ffn_dim, instance.tp_degrees)


def max_batch_size(config: ModelShape, setup: Setup, instance: Instance) -> int:
    """The largest batch size that fits, all else as in `setup`; 0 if not even 1 does."""
    return _largest(lambda n: plan_memory(config, replace(setup, batch_size=n), instance).fits, 2**20)


def max_sequence_length(config: ModelShape, setup: Setup, instance: Instance) -> int:
    """The longest sequence that fits, up to the model's positions, all else as in `setup`; 0 if none does."""
    limit = config.max_position_embeddings
    return _largest(lambda n: plan_memory(config, replace(setup, sequence_length=n), instance).fits, limit)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n of 1 to `limit` that fits, of which all below fit too; 0 if 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest_degree(config: ModelShape, setup: Setup, instance: Instance) -> int | None:
    """The smallest tensor-parallel degree at which `setup` fits on `instance`; None if none does."""
    for degree in tp_degrees(config, instance):
        if plan_memory(config, replace(setup, tp_degree=degree), instance).fits:
            return degree
    return None


def cheapest(config: ModelShape, setup: Setup) -> tuple[Instance, int] | None:
    """The first instance of INSTANCES on which `setup` fits at some degree, and the smallest such; None if none."""
    for instance in INSTANCES.values():
        degree = smallest_degree(config, setup, instance)
        if degree is not None:
            return instance, degree
    return None
