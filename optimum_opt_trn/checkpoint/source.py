"""Reading OPT weights, one tensor at a time, from the forms in which they are found."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import OPTConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .layout import TensorSpec, checkpoint_files


# Written by the first OPT conversions, and ignored by transformers as well.
_IGNORED = {"model.decoder.version"}


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not of the model that its config.json describes."""


class WeightSource:
    """Named tensors that are read when they are asked for.

    Args:
        readers: for each name, as the source spells it, a function that reads the tensor.
        origin: what error messages call the source.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]], origin: str):
        self.origin = origin
        named = {_canonical_name(name): reader for name, reader in readers.items()}
        self._readers = {name: reader for name, reader in named.items() if name not in _IGNORED}

    def check(self, config: OPTConfig) -> None:
        """Checks that the tensors are those of a model of `config`.

        Raises:
            CheckpointError: naming tensors that are missing or that do not belong.
        """
        expected = {name for specs in checkpoint_files(config).values() for name in specs}
        # A tied head is often written out all the same; the embedding is what counts.
        found = set(self._readers) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        for names, what in ((expected - found, "lacks"), (found - expected, "holds, beyond what config.json says,")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                raise CheckpointError(f"{self.origin} {what} {len(names)} tensors: {shown}. Is it whole, and an OPT?")

    def read(self, name: str, spec: TensorSpec, amp: torch.dtype) -> Tensor:
        """The tensor, cast as `spec` and `amp` say, contiguous.

        Raises:
            CheckpointError: if it is not there, is of another shape, is not of floating point, or is not finite
                after the cast.
        """
        if name not in self._readers:
            raise CheckpointError(f"{self.origin} lacks the tensor {name}.")
        try:
            tensor = self._readers[name]()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {spec.shape}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.origin}: {name} has dtype {tensor.dtype}, not one of floating point.")
        cast = tensor.to(spec.dtype(amp)).contiguous()
        if not torch.isfinite(cast).all():
            cause = "in the source" if not torch.isfinite(tensor).all() else f"once cast to {cast.dtype}: try bf16"
            raise CheckpointError(f"{self.origin}: {name} has values that are not finite {cause}.")
        return cast


def open_model(model: torch.nn.Module) -> WeightSource:
    """The weights of a loaded `OPTForCausalLM`, which is not changed."""
    return WeightSource({name: tensor.detach for name, tensor in model.state_dict().items()}, "the loaded model")


def open_directory(directory: Path) -> WeightSource:
    """The weights in a local directory: safetensors or PyTorch files, in one piece or sharded with an index.

    Raises:
        CheckpointError: if there are none, or if a file that the index names is missing or broken.
    """
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            files = [directory / single]
        elif (directory / index).is_file():
            files = _indexed_files(directory, index)
        else:
            continue
        readers: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{directory} lacks {file.name}, which its {index} names.")
            try:
                readers.update(_safetensors(file) if file.suffix == ".safetensors" else _pytorch_file(file))
            except (OSError, RuntimeError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file} is broken or not a checkpoint file ({error}).") from error
        return WeightSource(readers, str(directory))
    raise CheckpointError(
        f"{directory} has no weights: expected {SAFE_WEIGHTS_NAME}, {SAFE_WEIGHTS_INDEX_NAME}, {WEIGHTS_NAME} or "
        f"{WEIGHTS_INDEX_NAME}."
    )


def _indexed_files(directory: Path, index: str) -> list[Path]:
    try:
        names = sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{directory / index} is not a checkpoint index ({error!r}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{directory / index} points outside of its directory: {name!r}.")
    return [directory / name for name in names]


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    opened = safe_open(file, framework="pt")
    return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118


def _pytorch_file(file: Path) -> dict[str, Callable[[], Tensor]]:
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    try:
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by their names")
    return {name: tensor.detach for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _canonical_name(name: str) -> str:
    """The name as transformers' OPTForCausalLM spells it: OPTModel's checkpoints lack the prefix `model.`."""
    return f"model.{name}" if name.startswith("decoder.") else name
