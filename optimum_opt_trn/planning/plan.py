"""A whole plan: the instance, what fits there, how fast it can be, and what the host needs.

It needs neither weights nor a Neuron device, and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.layout import quantizes_head
from ..hardware import INSTANCES, GiB, Instance
from ..model.shapes import ModelShape
from .host import find_instance
from .memory import (
    MemoryPlan,
    cheapest,
    checkpoint_bytes,
    max_batch_size,
    max_sequence_length,
    plan_memory,
    rank_tensors,
    smallest_degree,
    tp_degrees,
)
from .roofline import REALISTIC_SHARE, Roofline, roofline
from .setup import OPTShape, Setup


# Memory for splitting a checkpoint of any size: a few chunks (checkpoint/source.py) at a time. Measured: up to 50 MB
# (docs/checkpoints.md); the rest is a reserve.
SPLIT_BYTES = GiB // 2


def read_shape(model: str, revision: str | None = None, cache_dir: str | None = None) -> OPTShape:
    """The shape of an OPT, or of the OPT in a BLIP-2.

    Args:
        model: a config.json, a directory that has one, or an id on the hub.
        revision, cache_dir: of an id, as in transformers.

    Raises:
        OSError: if there is no config.json.
        ValueError: if it is not an OPT's, or broken.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            # A copy in the cache comes first: it needs no connection, and shapes do not change.
            found = try_to_load_from_cache(model, "config.json", cache_dir, revision)
            if not isinstance(found, str):
                found = hf_hub_download(model, "config.json", revision=revision, cache_dir=cache_dir)
            path = Path(found)
        except (HFValidationError, OSError) as error:
            reason = f"cannot be fetched from the hub: {error}"
            raise OSError(f"{model} is not a local file or directory, and {reason}") from error
    try:
        values = json.loads(path.read_text())
        kind, text = values["model_type"], values.get("text_config")
        if quantization := values.get("quantization_config"):
            quantizes_head(quantization)  # raises if it cannot be read
    except (ValueError, KeyError, TypeError, AttributeError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a model's configuration ({error!r}).") from error
    if isinstance(text, dict) and text.get("model_type") == "opt":  # of a BLIP-2
        kind, values = "opt", text
    if kind != "opt":
        raise ValueError(f"{model} is of model_type {kind!r}, and optimum_opt_trn serves only 'opt'.")
    known = {field.name for field in fields(OPTShape)}
    return OPTShape(**{name: value for name, value in values.items() if name in known and value is not None})


@dataclass(frozen=True)
class Plan:
    """A model's plan on one instance.

    Args:
        config: the model's shape.
        memory: the memory plan.
        speed: the roofline; None on `cpu`.
        max_batch_size: the largest batch size that fits with the other options unchanged; 0 if none.
        max_sequence_length: the longest sequence that fits with the other options unchanged, up to the model's
            positions; 0 if none.
    """

    config: ModelShape
    memory: MemoryPlan
    speed: Roofline | None
    max_batch_size: int
    max_sequence_length: int

    @property
    def parameters(self) -> int:
        return sum(tensor.count * prod(tensor.shape) for tensor in rank_tensors(self.config, Setup()))

    @property
    def host(self) -> dict[str, int]:
        """Bytes that the host needs: on disk for the split checkpoint, in memory to write it, to trace and to load it.

        These are estimates, without the 0.4 GB or so of Python with torch. A checkpoint is written in chunks, and
        loaded to a device file by file. To trace, one rank's weights and caches are copied once, however many graphs
        there are; the compiler's memory is not included. On `cpu` nothing is traced, files of the checkpoint are
        mapped, and everything else in the plan is allocated. (A source file in PyTorch's format from before 1.6 has
        to be in memory as a whole.)
        """
        setup = self.memory.setup
        total, largest_file = checkpoint_bytes(self.config, setup)
        memory = self.memory
        on_core = sum(memory.weights.values()) + memory.cache
        if memory.instance.on_neuron:
            return {"disk": total, "split": SPLIT_BYTES, "trace": on_core, "load": largest_file}
        return {"disk": total, "split": SPLIT_BYTES, "trace": 0, "load": memory.total - on_core + memory.cache}

    def to_dict(self) -> dict[str, Any]:
        """What `optimum-cli neuron plan --json` prints: bytes, seconds and tokens per second."""
        memory, setup, instance, host = self.memory, self.memory.setup, self.memory.instance, self.host
        values: dict[str, Any] = {
            "fits": memory.fits,
            "instance": instance.name,
            "batch_size": setup.batch_size,
            "sequence_length": setup.sequence_length,
            "tensor_parallel_size": setup.tp_degree,
            "weight_dtype": setup.weight_dtype or setup.amp,
            "cache_dtype": setup.kv_cache_dtype,
            "parameters": self.parameters,
            "hbm_bytes_per_core": instance.core_bytes,
            "weights_bytes_per_core": sum(memory.weights.values()),
            "weights_by_part": memory.weights,
            "cache_bytes_per_core": memory.cache,
            "workspace_bytes_per_core": memory.workspace,
            "workspace_by_graph": memory.graphs,
            "untiled_scores_bytes_per_core": memory.scores,
            "reserve_bytes_per_core": memory.reserve,
            "free_bytes_per_core": memory.free,
            "max_batch_size": self.max_batch_size,
            "max_sequence_length": self.max_sequence_length,
            "disk_bytes": host["disk"],
            "host_bytes_to_split": host["split"],
            "host_bytes_to_trace": host["trace"],
            "host_bytes_to_load": host["load"],
            "host_bytes": instance.host_bytes,
            "realistic_share": REALISTIC_SHARE,
        }
        speed = self.speed
        values |= {
            "decode_bytes_per_step_per_core": speed and speed.decode_bytes,
            "decode_seconds_per_step": speed and speed.decode_seconds,
            "decode_tokens_per_second": speed and speed.decode_tokens_per_second,
            "decode_tokens_per_second_realistic": speed and speed.decode_tokens_per_second * REALISTIC_SHARE,
            "prefill_flops_per_core": speed and speed.prefill_flops,
            "prefill_seconds": speed and speed.prefill_seconds,
            "prefill_tokens_per_second": speed and speed.prefill_tokens_per_second,
            "prefill_tokens_per_second_realistic": speed and speed.prefill_tokens_per_second * REALISTIC_SHARE,
        }
        return values


def make_plan(config: ModelShape, setup: Setup, instance: Instance) -> Plan:
    """The plan of `setup` on `instance`.

    Raises:
        ValueError: if the sequence is longer than the model's positions, or if the model or the instance cannot be
            split into `tp_degree` parts; the message names the possible values.
    """
    limit, degrees = config.max_position_embeddings, tp_degrees(config, instance)
    if setup.sequence_length > limit:
        raise ValueError(f"sequence_length={setup.sequence_length} exceeds the {limit} positions that the model has.")
    if setup.tp_degree not in degrees:
        raise ValueError(
            f"tensor_parallel_size={setup.tp_degree}: {instance.name} runs this model, which has "
            f"{config.num_attention_heads} attention heads, at {', '.join(map(str, degrees))}."
        )
    memory = plan_memory(config, setup, instance)
    return Plan(
        config,
        memory,
        roofline(config, memory),
        max_batch_size(config, setup, instance),
        max_sequence_length(config, setup, instance),
    )


def choose_plan(config: ModelShape, setup: Setup, instance: str | None, degree: int | None) -> Plan:
    """The plan on `instance` at `degree`.

    If one of them is None, it is chosen: the cheapest that fits, or the one with the most memory if none fits.

    Raises:
        ValueError: as `make_plan`, or for an unknown instance.
    """
    if degree is not None:
        setup = replace(setup, tp_degree=degree)
    if instance is not None:
        chosen = find_instance(instance)
        if degree is None:
            best = smallest_degree(config, setup, chosen) or tp_degrees(config, chosen)[-1]
            setup = replace(setup, tp_degree=best)
        return make_plan(config, setup, chosen)
    if degree is None:
        chosen, best = cheapest(config, setup) or _largest_memory(config)
        return make_plan(config, replace(setup, tp_degree=best), chosen)
    able = [i for i in INSTANCES.values() if degree in tp_degrees(config, i)]
    fitting = [i for i in able if plan_memory(config, setup, i).fits]
    return make_plan(config, setup, (fitting or able or list(INSTANCES.values()))[0])


def _largest_memory(config: ModelShape) -> tuple[Instance, int]:
    degrees = {name: tp_degrees(config, instance)[-1] for name, instance in INSTANCES.items()}
    name = max(degrees, key=lambda name: degrees[name] * INSTANCES[name].core_bytes)
    return INSTANCES[name], degrees[name]


def plan_everywhere(config: ModelShape, setup: Setup) -> Iterator[Plan]:
    """The plan on each instance, at the smallest degree that fits, or at the largest if none fits."""
    for instance in INSTANCES.values():
        degree = smallest_degree(config, setup, instance) or tp_degrees(config, instance)[-1]
        yield make_plan(config, replace(setup, tp_degree=degree), instance)
