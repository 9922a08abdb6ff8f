"""Calls that any torch module or transformers model takes: what is harmless works, the rest says what to do."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from against_transformers import pair
from small_models import KINDS, tiny_opt
from transformers import OPTForCausalLM


def test_calls_that_ask_for_what_is():
    model, _ = pair()
    same = [
        model.half(),
        model.cpu(),
        model.eval(),
        model.train(False),
        model.requires_grad_(False),
        model.to("cpu"),
        model.to(torch.device("cpu")),
        model.to(torch.float16),
        model.to(device="cpu", dtype=torch.float16),
        model.to("cpu", torch.float16, non_blocking=True),
        model.to(torch.zeros(1, dtype=torch.float16)),
        accelerate.Accelerator(cpu=True).prepare(model),
    ]
    assert all(result is model for result in same)
    assert model.training is False


REFUSED = {
    "float": (lambda m: m.float(), ValueError, r"torch.float16 since the export.*torch.float32.*amp='f32'"),
    "bfloat16": (lambda m: m.bfloat16(), ValueError, "amp='bf16'"),
    "double": (lambda m: m.double(), ValueError, "torch.float64.*float16, bfloat16 or float32"),
    "to dtype": (lambda m: m.to(device="cpu", dtype=torch.bfloat16), ValueError, "torch.bfloat16.*leave the cast out"),
    "cuda": (lambda m: m.cuda(), ValueError, "cannot be moved to cuda.*instance_type='cpu'"),
    "cuda of an index": (lambda m: m.cuda(1), ValueError, "cannot be moved to cuda:1"),
    "to cuda": (lambda m: m.to("cuda:0"), ValueError, "cannot be moved to cuda:0"),
    "to a number": (lambda m: m.to(0), ValueError, "cannot be moved to cuda:0"),
    "train": (lambda m: m.train(), NotImplementedError, "inference only.*OPTForCausalLM.*export"),
    "gradients": (lambda m: m.requires_grad_(), NotImplementedError, "inference only"),
    "pickle": (lambda m: pickle.dumps(m), TypeError, "save_pretrained.*from_pretrained"),
    "deepcopy": (lambda m: copy.deepcopy(m), TypeError, "save_pretrained.*from_pretrained"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_other_calls_say_what_to_do(call):
    do, kind, message = REFUSED[call]
    with pytest.raises(kind, match=message):
        do(pair()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_bytes_are_transformers(kind, tmp_path):
    ours, _ = pair(kind)
    source = tiny_opt(**KINDS[kind])
    assert ours.num_parameters() == source.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == source.num_parameters(exclude_embeddings=True)
    assert ours.num_parameters(only_trainable=True) == 0
    # The split checkpoint has the dtypes of the weights in memory.
    stored = OPTForCausalLM.from_pretrained(ours.directory / "checkpoint", dtype="auto")
    norms = [p for n, p in source.named_parameters() if "layer_norm" in n or "embed_positions" in n]
    in_amp = sum(p.numel() for p in source.parameters()) - sum(p.numel() for p in norms)
    weights = 2 * in_amp + 4 * sum(p.numel() for p in norms)
    assert ours.get_memory_footprint(return_buffers=False) == weights
    assert stored.dtype == ours.dtype
    # Three slots of 64 positions in float32, a key and a value of 64 numbers in each of two layers.
    assert ours.get_memory_footprint() == weights + 3 * 64 * 2 * 2 * 64 * 4
