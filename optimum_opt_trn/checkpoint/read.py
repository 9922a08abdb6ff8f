"""Reading a split checkpoint for the local ranks, as views of memory-mapped files.

A column-parallel shard is a block of rows of the stored matrix, and a row-parallel shard is strided columns of it, so
that neither is copied. Pages are read when they are first used, and all ranks and processes of a host share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import OPTConfig

from ..configuration_opt import OPTNeuronConfig
from ..dtypes import to_torch
from ..model.parallel import RankGroup, Weights, shard_dim, shard_range
from .layout import (
    INDEX_NAME,
    OUTER_FILE,
    CheckpointError,
    TensorSpec,
    checkpoint_files,
    layer_file,
    layer_prefix,
)


EMBED_WEIGHTS = ("embed_tokens.weight", "embed_positions.weight", "project_in.weight")
HEAD_WEIGHTS = (
    *("final_layer_norm.weight", "final_layer_norm.bias", "project_out.weight"),
    *("lm_head.weight", "lm_head.weight_scale"),
)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of the rank program's parts, for the local ranks.

    Args:
        embed, layers, head: the shards of each part's tensors.
        ranks: int32 `(local ranks,)`, which ranks these are.
    """

    embed: Weights
    layers: list[Weights]
    head: Weights
    ranks: Tensor


def load_weights(directory: Path, config: OPTConfig, neuron_config: OPTNeuronConfig, group: RankGroup) -> ModelWeights:
    """The local ranks' shards of the split checkpoint in `directory`.

    Raises:
        CheckpointError: if a file or tensor is missing, foreign, broken, or of another shape or dtype than `config`
            and `neuron_config` say.
    """
    if not (directory / INDEX_NAME).is_file():
        raise CheckpointError(f"{directory} lacks {INDEX_NAME}: it is not a split checkpoint, or incomplete.")
    specs = checkpoint_files(config, neuron_config.amp, neuron_config.weight_dtype)
    files = {file: _load_file(directory / file, tensors, group) for file, tensors in specs.items()}
    outer = {name.removeprefix("model.decoder."): shards for name, shards in files[OUTER_FILE].items()}
    layers = []
    for index in range(config.num_hidden_layers):
        prefix = layer_prefix(index)
        layers.append({name.removeprefix(prefix): shards for name, shards in files[layer_file(index)].items()})
    outer.setdefault("lm_head.weight", outer["embed_tokens.weight"])
    ranks = torch.tensor(list(group.ranks), dtype=torch.int32)
    return ModelWeights(_pick(outer, EMBED_WEIGHTS), layers, _pick(outer, HEAD_WEIGHTS), ranks)


def _pick(weights: Weights, names: tuple[str, ...]) -> Weights:
    return {name: weights[name] for name in names if name in weights}


def _load_file(file: Path, specs: dict[str, TensorSpec], group: RankGroup) -> Weights:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} lacks {file.name}: it is incomplete. Export the model again.")
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or broken ({error}). Export the model again.") from error
    found = set(opened.keys())
    if found != set(specs):
        what = (
            f"lacks {sorted(set(specs) - found)[0]}" if set(specs) - found else f"also holds {min(found - set(specs))}"
        )
        raise CheckpointError(f"{file} {what}: it is not of the model that config.json describes.")
    return {name: _shards(file, opened.get_tensor(name), name, spec, group) for name, spec in specs.items()}


def _shards(file: Path, tensor: Tensor, name: str, spec: TensorSpec, group: RankGroup) -> list[Tensor]:
    dtype = to_torch(spec.dtype)
    if tuple(tensor.shape) != spec.shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the configuration makes it "
            f"{dtype} {spec.shape}. Export the model again."
        )
    dim = shard_dim(name)
    if dim is None or group.tp_degree == 1:
        return [tensor]
    shards = []
    for rank in group.ranks:
        start, stop, padding = shard_range(spec.shape[dim], rank, group.tp_degree)
        shard = tensor.narrow(dim, start, stop - start)
        # Only a vocabulary that does not divide is padded, in dimension 0 and by a copy: planning's check_model.
        shards.append(F.pad(shard, (0, 0, 0, padding)) if padding else shard)
    return shards
