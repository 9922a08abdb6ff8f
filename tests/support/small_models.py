"""Small random OPTs of every kind in the family, and the reference that ours are compared with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import OPTConfig, OPTForCausalLM


try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4.57
    from transformers.modeling_utils import no_init_weights


SHIPPED_MODEL = Path(__file__).parents[2] / "examples" / "models" / "opt-austen"

# Each kind of the family: what its configuration has that the 125M to 175B models have not.
KINDS: dict[str, dict] = {
    "pre_norm": {},
    "post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "galactica": {"enable_bias": False, "activation_function": "gelu", "layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "odd_vocabulary": {"vocab_size": 203},
}


def tiny_config(**overrides) -> OPTConfig:
    options = {
        "vocab_size": 128,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 224,
    }
    return OPTConfig(**{**options, **overrides})


def tiny_opt(seed: int = 0, **overrides) -> OPTForCausalLM:
    """A float32 OPT with random weights, biases and layernorms included, large enough that tokens vary."""
    with no_init_weights():  # transformers cannot initialise layernorms without weights
        model = OPTForCausalLM(tiny_config(**overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "layer_norm.weight" in name else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model


def rounded(model: OPTForCausalLM, dtype: torch.dtype = torch.float16) -> OPTForCausalLM:
    """The reference: float32 arithmetic on weights that were rounded as an export rounds them."""
    reference = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "layer_norm" not in name and "embed_positions" not in name:
                parameter.copy_(parameter.to(dtype).float())
    return reference


def untied(model: OPTForCausalLM) -> OPTForCausalLM:
    """`model` with a head of its own, which is a copy if it was tied."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def dequantized(model: OPTForCausalLM, head: bool = True) -> OPTForCausalLM:
    """The reference: `model` with its matrices quantized by numpy, in float32; with `head` the head, untied, too."""
    if head:
        untied(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (".layers." in name and parameter.dim() == 2) or (head and name == "lm_head.weight"):
                matrix = parameter.numpy()
                scale = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
                parameter.copy_(torch.from_numpy(np.clip(np.rint(matrix / scale), -127, 127) * scale))
    return model


def save_as_pytorch(model: OPTForCausalLM, directory: Path, shard_size: int | None = None) -> None:
    """Saves an ordinary checkpoint as pytorch_model.bin, which transformers 5 reads and does not write any more.

    Args:
        shard_size: bytes of a shard at most; None for one file.
    """
    model.save_pretrained(directory)
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    state = model.state_dict()
    if shard_size is None:
        torch.save(state, directory / "pytorch_model.bin")
        return
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=shard_size
    )
    for name, tensors in plan.filename_to_tensors.items():
        torch.save({tensor: state[tensor].clone() for tensor in tensors}, directory / name)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
