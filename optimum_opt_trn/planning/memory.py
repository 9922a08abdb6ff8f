"""The memory plan: how much a model takes on each core, from only its config.json; what fits, and what is refused.

Weights and cache are exact: the tensors of `checkpoint/layout.py`, cut over ranks as `model/shapes.py` says, which has
the cache's shape too. Workspace is the rank program's tensors (`workspace.py`). What the Neuron runtime takes for
itself is a calibrated constant. See docs/memory.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ..buckets import SHORTEST_SEQUENCE
from ..checkpoint.layout import TensorSpec, layer_prefix, layer_specs, outer_specs
from ..hardware import INSTANCES, GiB, Instance, in_units
from ..model.shapes import ModelShape, cache_shape, shard_dim, shard_range
from .host import host_threads, largest_of_family
from .setup import Setup
from .workspace import cpu_buffers, graph_workspace, prompt_scores


if TYPE_CHECKING:
    from ..configuration_opt import OPTNeuronConfig


# What transformers' get_logger returns, too; but a plan does not import transformers.
logger = logging.getLogger(__name__)

# Memory for a core's runtime, code and DMA rings. Calibrated: OPT-13B in float16 at 2048 positions runs on the two
# cores of a trn1.2xlarge at batch size 2, and not at 3. The plan says so with any reserve of 0.65 to 1.93 GiB; with
# 1.13 to 1.43 GiB it says so whether or not scores are counted and pages are rounded up (docs/memory.md). 96 MiB of it
# are a core's microcode (AWS Neuron documentation, "Neuron Device Memory").
NEURON_RESERVE = 5 * GiB // 4

# All graphs share one scratchpad, of as many pages as the largest graph needs (same source).
SCRATCHPAD_PAGE = GiB // 2

GROUPS = ("attention", "mlp", "embeddings and head", "positions, layernorms")


class DoesNotFitError(ValueError):
    """An export that needs more memory than there is."""


@dataclass(frozen=True)
class RankTensor:
    """A rank's shard of a weight.

    Args:
        name: the name in the checkpoint; in a layer, the name in the first layer.
        shape: shape of the shard, padding included; the same for every rank.
        bytes: size of the shard, with the scales of `int8`.
        copied: whether every rank has the whole tensor.
        count: number of such tensors: the layers, or 1.
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
    """The shards of one of `setup.tp_degree` ranks; the weights of a layer come once for all layers."""
    specs_of_layer = layer_specs(config, setup.amp, setup.weight_dtype)
    layer = {layer_prefix(0) + name: spec for name, spec in specs_of_layer.items()}
    outer = outer_specs(config, setup.amp, setup.weight_dtype)
    for specs, count in ((outer, 1), (layer, config.num_hidden_layers)):
        for name, spec in specs.items():
            dim, shape = shard_dim(name), list(spec.shape)
            if dim is not None:
                start, stop, padding = shard_range(shape[dim], 0, setup.tp_degree)
                shape[dim] = stop - start + padding
            shard = TensorSpec(tuple(shape), spec.dtype)
            yield RankTensor(name, shard.shape, shard.bytes, dim is None, count)


def checkpoint_bytes(config: ModelShape, setup: Setup) -> tuple[int, int]:
    """Bytes of the split checkpoint's tensors: in all files, and in the largest file."""
    outer, layer = (
        sum(spec.bytes for spec in specs.values())
        for specs in (specs_of(config, setup.amp, setup.weight_dtype) for specs_of in (outer_specs, layer_specs))
    )
    return outer + config.num_hidden_layers * layer, max(outer, layer)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one core; on `cpu`, of the process that holds all ranks.

    Args:
        instance, setup: what the plan was made for.
        weights: bytes of weights, for each of GROUPS.
        cache: bytes of keys and values of all layers.
        graphs: bytes of workspace that each graph needs at most at a time.
        workspace: bytes reserved for the workspace, once for all graphs.
        reserve: bytes of runtime and code; on `cpu`, of the buffers of threads.
        scores: bytes that the scores of a prompt would add to the workspace if the compiler did not tile them.
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
        """Bytes of the core's memory that remain; negative if the plan does not fit."""
        return self.instance.core_bytes - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0

    @property
    def runs(self) -> bool:
        """Whether it can run at all. On `cpu`, weights are mapped files, which can be read from the disk again."""
        mapped = 0 if self.instance.on_neuron else sum(self.weights.values())
        return self.free + mapped >= 0


def plan_memory(config: ModelShape, setup: Setup, instance: Instance) -> MemoryPlan:
    """The plan of `setup` for each core of `instance`."""
    # On cpu, one process has the shards of all ranks, and one copy of the tensors that are not cut.
    ranks = 1 if instance.on_neuron else setup.tp_degree
    weights = dict.fromkeys(GROUPS, 0)
    for tensor in rank_tensors(config, setup):
        weights[tensor.group] += tensor.bytes * tensor.count * (1 if tensor.copied else ranks)
    cache = 2 * config.num_hidden_layers * prod(cache_shape(config, setup)) * setup.cache_bytes * ranks
    graphs = graph_workspace(config, setup, instance.on_neuron)
    workspace = max(graphs.values())
    if not instance.on_neuron:
        return MemoryPlan(instance, setup, weights, cache, graphs, workspace, cpu_buffers(config, host_threads()))
    pages = -(-workspace // SCRATCHPAD_PAGE)
    scores = prompt_scores(config, setup)
    return MemoryPlan(instance, setup, weights, cache, graphs, pages * SCRATCHPAD_PAGE, NEURON_RESERVE, scores)


def tp_degrees(config: ModelShape, instance: Instance | None = None) -> tuple[int, ...]:
    """The degrees, ascending, that split the model's heads and MLP into equal parts, and that `instance` supports.

    Without an instance, or on `cpu`, all that split them.
    """
    heads, units = config.num_attention_heads, config.ffn_dim
    supported = (instance and instance.tp_degrees) or range(1, heads + 1)
    return tuple(n for n in supported if heads % n == 0 and units % n == 0)


def max_batch_size(config: ModelShape, setup: Setup, instance: Instance) -> int:
    """The largest batch size that fits with the other options of `setup`; 0 if 1 does not fit."""
    return _largest(lambda n: plan_memory(config, replace(setup, batch_size=n), instance).fits, 2**20)


def max_sequence_length(config: ModelShape, setup: Setup, instance: Instance) -> int:
    """The longest sequence, up to the model's positions, that fits with the other options; 0 if none fits."""
    limit = config.max_position_embeddings
    return _largest(lambda n: plan_memory(config, replace(setup, sequence_length=n), instance).fits, limit)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n from 1 to `limit` that fits, if all smaller ones fit as well; 0 if 1 does not fit."""
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


def check_model(config: ModelShape, neuron_config: OPTNeuronConfig) -> None:
    """Checks that a model of `config` can be exported with these options.

    Raises:
        ValueError: if `sequence_length` exceeds the positions that the model has, or if its heads or its MLP cannot be
            split into `tp_degree` equal parts; the message names the limit and the possible values.
    """
    length, limit = neuron_config.sequence_length, config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"sequence_length={length} exceeds the {limit} positions that the model was trained with "
            f"(max_position_embeddings): choose at most {limit}."
        )
    degree, degrees = neuron_config.tp_degree, tp_degrees(config)
    if degree not in degrees:
        raise ValueError(
            f"tp_degree={degree} cannot split {config.num_attention_heads} attention heads and an MLP of "
            f"{config.ffn_dim} into equal parts: choose one of {', '.join(map(str, degrees))}."
        )


def check_fit(config: ModelShape, neuron_config: OPTNeuronConfig, force: bool = False) -> None:
    """Checks an export against the cores of its instance family, or on `cpu` against the memory available now.

    On `cpu` everything except the weights has to fit. Weights are mapped files: if memory is short, there is a warning
    that they are read from the disk again and again. With `force` there are only warnings.

    Raises:
        DoesNotFitError: with the sums, and with settings that fit.
    """
    try:
        instance = largest_of_family(neuron_config.instance_type)
    except OSError:  # the system does not tell how much memory there is
        return
    setup = Setup.of(neuron_config)
    plan = plan_memory(config, setup, instance)
    if plan.fits:
        return
    if plan.runs:
        logger.warning(f"{_shortage(plan)}. Weights will be read from the disk again and again, which is slow.")
        return
    if force:
        logger.warning(f"{_shortage(plan)}. Continuing, since force is given.")
        return
    ways = [*_settings_that_fit(config, setup, instance), "force=True (--force) to continue in spite of this"]
    raise DoesNotFitError(f"{_shortage(plan)}. Choose {', or '.join(ways)}.")


def _shortage(plan: MemoryPlan) -> str:
    setup, instance = plan.setup, plan.instance
    parts = {
        "weights": sum(plan.weights.values()),
        "cache": plan.cache,
        "workspace": plan.workspace,
        "reserve": plan.reserve,
    }
    listed = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items() if size)
    where = f"a core of {instance.family.name} has" if instance.on_neuron else "are available on this host"
    return (
        f"batch_size={setup.batch_size}, sequence_length={setup.sequence_length}, tp_degree={setup.tp_degree} needs "
        f"{in_units(plan.total)} ({listed}), {in_units(-plan.free)} more than the {in_units(instance.core_bytes)} "
        f"that {where}"
    )


def _settings_that_fit(config: ModelShape, setup: Setup, instance: Instance) -> Iterator[str]:
    """The nearest settings that fit, each a change of one option."""
    if size := max_batch_size(config, setup, instance):
        yield f"batch_size={size}"
    if (length := max_sequence_length(config, setup, instance)) >= SHORTEST_SEQUENCE:
        yield f"sequence_length={length}"
    if not instance.on_neuron:
        return
    if degree := smallest_degree(config, setup, instance):
        yield f"tp_degree={degree}"
    elif other := cheapest(config, setup):
        yield f"{other[0].name} with tp_degree={other[1]}"
