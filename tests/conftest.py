"""Fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_models import tiny_opt
from transformers import OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM


# Small products gain nothing from threads, and lose much where other processes hold the cores.
torch.set_num_threads(1)


@pytest.fixture
def save_opt(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model (made from `overrides` if none is given) as an ordinary checkpoint, and returns its directory."""

    def save(model: OPTForCausalLM | None = None, name: str = "source", **overrides) -> Path:
        (model or tiny_opt(**overrides)).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def load_opt(save_opt: Callable[..., Path]) -> Callable[..., NeuronOPTForCausalLM]:
    """Exports a model on the fly and loads it, eagerly unless asked otherwise."""

    def load(model: OPTForCausalLM, **options) -> NeuronOPTForCausalLM:
        return NeuronOPTForCausalLM.from_pretrained(save_opt(model), **{"eager": True, **options})

    return load


@pytest.fixture
def medium() -> Iterator[None]:
    """Products on `cpu` may round their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)
