"""Random LoRA adapters, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel


EVERYTHING = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def make_adapter(directory: Path, model: PreTrainedModel, seed: int = 0, **settings: Any) -> Path:
    """Saves an adapter of `model` with random matrices, as PEFT does."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": EVERYTHING, **settings}
    wrapped = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(directory)
    wrapped.unload()
    return directory
