"""What callers of torch modules and of transformers models call on any model.

An export is not a `torch.nn.Module`: its weights have their dtype and place since the export. Calls that ask for what
it is already do nothing; the others raise an error that says what to do.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import OPTConfig

from .checkpoint.layout import CHECKPOINT_DIR, OUTER_FILE, TOKEN_EMBEDDINGS, TensorSpec, checkpoint_files
from .configuration_opt import OPTNeuronConfig
from .dtypes import AMP_DTYPES, DTYPES


Self = TypeVar("Self", bound="ModuleMethodsMixin")


class ModuleMethodsMixin:
    """Methods of `torch.nn.Module` and `transformers.PreTrainedModel`, for a model with weights that do not change."""

    config: OPTConfig
    neuron_config: OPTNeuronConfig
    directory: Path

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights of attention, MLP and embeddings."""
        return self.neuron_config.amp_dtype

    @property
    def training(self) -> bool:
        """Always False."""
        return False

    def eval(self: Self) -> Self:
        return self

    def train(self: Self, mode: bool = True) -> Self:
        """The model, for `mode=False`; NotImplementedError otherwise."""
        if mode:
            _refuse_training("train()")
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """The model, for `requires_grad=False`; NotImplementedError otherwise."""
        if requires_grad:
            _refuse_training("requires_grad_(True)")
        return self

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """The model. Arguments as of `torch.nn.Module.to`.

        Raises:
            ValueError: for any device but the host's, from where calls go to the NeuronCores; for any dtype but that
                of the weights.
            TypeError: for arguments that `torch.nn.Module.to` does not take either.
        """
        # A number is a GPU's; without one, torch's own parser does not say which.
        args = tuple(f"cuda:{arg}" if type(arg) is int else arg for arg in args)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            raise ValueError(
                f"The model cannot be moved to {device}: it runs where it was exported for "
                f"(instance_type={self.neuron_config.instance_type!r}), and is called from the host. Leave the device "
                "out, or use 'cpu'."
            )
        if dtype not in (None, self.dtype):
            amp = next((name for name in AMP_DTYPES if f"torch.{DTYPES[name].torch}" == str(dtype)), None)
            way_out = (
                f"export the model again with amp={amp!r}" if amp else "exports have float16, bfloat16 or float32"
            )
            raise ValueError(
                f"The weights are {self.dtype} since the export (amp={self.neuron_config.amp!r}) and cannot be cast "
                f"to {dtype}: leave the cast out, or {way_out}."
            )
        return self

    def cpu(self: Self) -> Self:
        return self

    def cuda(self: Self, device: int | str | torch.device | None = None) -> Self:
        """ValueError: no target is a GPU."""
        return self.to(torch.device("cuda") if device is None else device)

    def half(self: Self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self: Self) -> Self:
        return self.to(torch.bfloat16)

    def float(self: Self) -> Self:
        return self.to(torch.float32)

    def double(self: Self) -> Self:
        return self.to(torch.float64)

    def get_input_embeddings(self) -> InputEmbeddings:
        """The embedding of tokens: ids → what `generate(inputs_embeds=…)` takes."""
        return InputEmbeddings(self._token_embeddings)

    @cached_property
    def _token_embeddings(self) -> Tensor:
        """`(vocabulary, word_embed_proj_dim)` in `dtype`, mapped from the checkpoint, where every target has it."""
        with safe_open(self.directory / CHECKPOINT_DIR / OUTER_FILE, framework="pt") as file:
            weight: Tensor = file.get_tensor(TOKEN_EMBEDDINGS)
        return weight

    def as_module(self) -> nn.Module:
        """The model as a `torch.nn.Module` without parameters, for models that have it as a part, such as BLIP-2:
        `blip2.language_model = model.as_module()`."""
        return _ModelAsModule(self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters the model has; tied ones count once.

        Args:
            only_trainable: count what can be trained: nothing of an export.
            exclude_embeddings: leave out the embeddings of tokens and positions.
        """
        if only_trainable:
            return 0
        return sum(
            prod(spec.shape)
            for name, spec in self._weight_specs().items()
            if not (exclude_embeddings and ".embed_" in name)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights and, with `return_buffers`, of the key/value cache of all slots."""
        weights = sum(spec.bytes for spec in self._weight_specs().values())
        positions = self.neuron_config.batch_size * self.neuron_config.sequence_length
        per_position = 2 * self.config.num_hidden_layers * self.config.hidden_size  # a key and a value in each layer
        cache = positions * per_position * self.neuron_config.cache_dtype.itemsize
        return weights + (cache if return_buffers else 0)

    def _weight_specs(self) -> dict[str, TensorSpec]:
        files = checkpoint_files(self.config, self.neuron_config.amp, self.neuron_config.weight_dtype)
        return {name: spec for specs in files.values() for name, spec in specs.items()}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A loaded model cannot be pickled or copied: keep it with save_pretrained(DIRECTORY), pass that name on, "
            f"and call {type(self).__name__}.from_pretrained(DIRECTORY) there (it is loaded from {self.directory})."
        )


class InputEmbeddings(nn.Module):
    """Looks up the embeddings of token ids.

    Args:
        weight: `(vocabulary, word_embed_proj_dim)`, in any dtype.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Integers `(…)` → float32 `(…, word_embed_proj_dim)`."""
        return F.embedding(input_ids, self.weight).float()


class _ModelAsModule(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def _refuse_training(call: str) -> NoReturn:
    raise NotImplementedError(
        f"{call}: an export is for inference only. Train the checkpoint with transformers.OPTForCausalLM, and export "
        "the result."
    )
