"""The memory plan: what a model takes on each core, from its config.json alone, and what fits.

Weights and cache are exact: the tensors of `checkpoint/layout.py`, cut by `sharding.py`, which has the cache's shape
too. Workspace is the rank program's tensors (`workspace.py`). What the Neuron runtime takes for itself is a calibrated
constant. See docs/memory.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, cast

from ..checkpoint.layout import TensorSpec, layer_prefix, layer_specs, outer_specs
from ..hardware import INSTANCES, GiB, Instance
from ..model.shapes import cache_shape, shard_dim, shard_range
from .workspace import CPU_THREAD_BYTES, graph_workspace, prompt_scores


if TYPE_CHECKING:
    from transformers import OPTConfig

    from ..configuration_opt import OPTNeuronConfig


# Bytes of an element. `int8` is a planning figure, exports do not have it: matrices of one byte an element with a
# float32 scale for each output channel, the rest in 16 bits.
DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "int8": 1}
_SCALE_BYTES = 4
_FLOAT32_BYTES = 4

# What a core's runtime, code and DMA rings take. Calibrated: OPT-13B in float16 at 2048 positions on the two cores of
# a trn1.2xlarge runs at batch size 2 and does not at 3. That holds for any reserve of 0.65 to 1.93 GiB; of 1.13 to
# 1.43 GiB it holds whether or not scores are counted and pages are filled (docs/memory.md). 96 MiB of it are a core's
# microcode (AWS Neuron documentation, "Neuron Device Memory").
NEURON_RESERVE = 5 * GiB // 4

# The runtime shares one scratchpad among all graphs, of as many pages as the largest needs (same page).
SCRATCHPAD_PAGE = GiB // 2

GROUPS = ("attention", "mlp", "embeddings and head", "positions, layernorms")


@dataclass(frozen=True)
class Setup:
    """What a plan is made for.

    Args:
        batch_size: slots of the cache.
        sequence_length: positions of a slot.
        tp_degree: ranks.
        weights: dtype of the weights that are in `amp`, or `int8`.
        cache: dtype of the cache; by default that of the weights, 16-bit with `int8`.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    tp_degree: int = 1
    weights: str = "f16"
    cache: str = ""

    def __post_init__(self) -> None:
        if not self.cache:
            object.__setattr__(self, "cache", "f16" if self.weights == "int8" else self.weights)

    @classmethod
    def of(cls, neuron_config: OPTNeuronConfig) -> Setup:
        """That of an export."""
        return cls(
            neuron_config.batch_size,
            neuron_config.sequence_length,
            neuron_config.tp_degree,
            neuron_config.amp,
            neuron_config.kv_cache_dtype or "",
        )

    @property
    def weight_bytes(self) -> int:
        return DTYPE_BYTES[self.weights]

    @property
    def compute_bytes(self) -> int:
        """Of an element of a product's factors on Neuron, where int8 is converted on the way."""
        return max(self.weight_bytes, 2)

    @property
    def cache_bytes(self) -> int:
        return DTYPE_BYTES[self.cache]


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


def rank_tensors(config: OPTConfig, setup: Setup) -> Iterator[RankTensor]:
    """Every weight of the model, as one of `setup.tp_degree` ranks has it; those of a layer once for all layers."""
    layer = {layer_prefix(0) + name: spec for name, spec in layer_specs(config).items()}
    for specs, count in ((outer_specs(config), 1), (layer, config.num_hidden_layers)):
        for name, spec in specs.items():
            dim, shape = shard_dim(name), list(spec.shape)
            if dim is not None:
                start, stop, padding = shard_range(shape[dim], 0, setup.tp_degree)
                shape[dim] = stop - start + padding
            yield RankTensor(name, tuple(shape), _tensor_bytes(tuple(shape), spec, setup), dim is None, count)


def _tensor_bytes(shape: tuple[int, ...], spec: TensorSpec, setup: Setup) -> int:
    if not spec.in_amp:
        return prod(shape) * _FLOAT32_BYTES
    if setup.weights == "int8":
        return prod(shape) * 2 if len(shape) == 1 else prod(shape) + shape[0] * _SCALE_BYTES
    return prod(shape) * setup.weight_bytes


def checkpoint_bytes(config: OPTConfig, setup: Setup) -> tuple[int, int]:
    """Bytes of the split checkpoint's tensors: of all its files, and of the largest one."""
    outer, layer = (
        sum(_tensor_bytes(spec.shape, spec, setup) for spec in specs.values())
        for specs in (outer_specs(config), layer_specs(config))
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


def plan_memory(config: OPTConfig, setup: Setup, instance: Instance) -> MemoryPlan:
    """The plan of `setup` for each core of `instance`."""
    # One process on cpu has every rank's shards, and once what ranks only have copies of.
    ranks = 1 if instance.on_neuron else setup.tp_degree
    weights = dict.fromkeys(GROUPS, 0)
    for tensor in rank_tensors(config, setup):
        weights[tensor.group] += tensor.bytes * tensor.count * (1 if tensor.copied else ranks)
    # cache_shape reads three fields, which a Setup has as well.
    shape = cache_shape(config, cast("OPTNeuronConfig", setup))
    cache = 2 * config.num_hidden_layers * prod(shape) * setup.cache_bytes * ranks
    graphs = graph_workspace(config, setup, instance.on_neuron)
    workspace = max(graphs.values())
    if not instance.on_neuron:
        return MemoryPlan(instance, setup, weights, cache, graphs, workspace, host_threads() * CPU_THREAD_BYTES)
    pages = -(-workspace // SCRATCHPAD_PAGE)
    scores = prompt_scores(config, setup)
    return MemoryPlan(instance, setup, weights, cache, graphs, pages * SCRATCHPAD_PAGE, NEURON_RESERVE, scores)


def host_threads() -> int:
    """The processors that this process may use; PyTorch has at most a thread for each."""
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def tp_degrees(config: OPTConfig, instance: Instance) -> tuple[int, ...]:
    """The degrees that `instance` supports and that split the model's heads and MLP into equal parts."""
    heads, ffn_dim = config.num_attention_heads, config.ffn_dim
    supported = instance.tp_degrees or range(1, heads + 1)
    return tuple(n for n in supported if heads % n == 0 and ffn_dim % n == 0)


def max_batch_size(config: OPTConfig, setup: Setup, instance: Instance) -> int:
    """The largest batch size that fits, all else as in `setup`; 0 if not even 1 does."""
    return _largest(lambda n: plan_memory(config, replace(setup, batch_size=n), instance).fits, 2**20)


def max_sequence_length(config: OPTConfig, setup: Setup, instance: Instance) -> int:
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


def smallest_degree(config: OPTConfig, setup: Setup, instance: Instance) -> int | None:
    """The smallest tensor-parallel degree at which `setup` fits on `instance`; None if none does."""
    for degree in tp_degrees(config, instance):
        if plan_memory(config, replace(setup, tp_degree=degree), instance).fits:
            return degree
    return None


def cheapest(config: OPTConfig, setup: Setup) -> tuple[Instance, int] | None:
    """The first instance of INSTANCES on which `setup` fits at some degree, and the smallest such; None if none."""
    for instance in INSTANCES.values():
        degree = smallest_degree(config, setup, instance)
        if degree is not None:
            return instance, degree
    return None
