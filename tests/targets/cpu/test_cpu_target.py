"""Every kind of the family, compiled: the same tokens as transformers, and the same as run eagerly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from small_models import KINDS, rounded, tiny_opt
from transformers import set_seed

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic


OPTIONS = {"batch_size": 2, "sequence_length": 96, "kv_cache_dtype": "f32"}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 70}


@pytest.mark.parametrize(
    ("kind", "tp_degree"), [*((kind, 2) for kind in KINDS), ("pre_norm", 1), ("post_norm", 1), ("pre_norm", 4)]
)
def test_compiled_equals_transformers_and_eager(kind, tp_degree, save_opt, tmp_path):
    source = tiny_opt(**KINDS[kind])
    path = save_opt(source)
    model = NeuronOPTForCausalLM.from_pretrained(path, tp_degree=tp_degree, **OPTIONS)
    assert isinstance(model.runtime.program.arithmetic, KernelArithmetic)
    ids = torch.tensor([[1, 1, 1, 9, 8, 7], [40, 41, 42, 43, 44, 45]])
    mask = (ids != 1).long()
    ours = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, rounded(source).generate(ids, attention_mask=mask, **GREEDY))
    with torch.no_grad():
        theirs = rounded(source)(ids[1:]).logits
    assert (model(ids).logits[1:] - theirs).abs().max() < 1e-3 * theirs.std()

    eager = NeuronOPTForCausalLM.from_pretrained(path, tp_degree=1, eager=True, **OPTIONS)
    sampled = []
    for either in (model, eager):
        set_seed(5)
        options = GREEDY | {"do_sample": True, "top_k": 30, "top_p": 0.95, "temperature": 1.3}
        sampled.append(either.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*sampled)


def test_compiled_with_16_bit_caches_is_within_tolerance(save_opt):
    source = tiny_opt()
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(source), batch_size=2, sequence_length=96)
    ids = torch.randint(4, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = rounded(source)(ids).logits
    assert (model(ids).logits - theirs).abs().max() < 2e-2 * theirs.std()


@pytest.mark.parametrize("batch", [9, 50])
def test_batches_beyond_few_rows(batch, save_opt):
    source = tiny_opt()
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(source), **OPTIONS | {"batch_size": batch})
    ids = torch.randint(4, 128, (batch, 5), generator=torch.Generator().manual_seed(0))
    options = GREEDY | {"max_new_tokens": 20}
    assert torch.equal(model.generate(ids, **options), rounded(source).generate(ids, **options))


def test_loads_and_runs_without_a_compiler(save_opt, tmp_path):
    source = tiny_opt()
    NeuronOPTForCausalLM.from_pretrained(save_opt(source), **OPTIONS).save_pretrained(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    program = (
        "import torch, shutil; from optimum_opt_trn import NeuronOPTForCausalLM as M\n"
        "assert shutil.which('g++') is None\n"
        f"model = M.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, eos_token_id=None, max_new_tokens=9)[0])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")} | {"PATH": str(empty)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "eagerly" not in done.stderr
    expected = rounded(source).generate(torch.tensor([[5, 6, 7]]), **GREEDY | {"max_new_tokens": 9})
    assert done.stdout.strip() == str(expected[0])


def test_what_overflowed_in_a_slot_does_not_reach_its_next_user(save_opt):
    source = tiny_opt()
    decoder = source.model.decoder
    with torch.no_grad():  # the first layer's values of token 77, and of no other, overflow float16
        decoder.embed_tokens.weight[77] = 0
        decoder.embed_tokens.weight[77, 0] = 1000
        value = decoder.layers[0].self_attn.v_proj.weight
        value[0] = 0
        value[0, 0] = 16000 / decoder.layers[0].self_attn_layer_norm.weight[0]
    path = save_opt(source)
    for eager in (False, True):
        model = NeuronOPTForCausalLM.from_pretrained(path, batch_size=1, sequence_length=64, eager=eager)

        def next_user(model=model) -> torch.Tensor:
            past = model(torch.tensor([[5, 6, 7]]), logits_to_keep=1).past_key_values
            return model(torch.tensor([[8]]), past_key_values=past).logits

        expected = next_user()
        assert expected.isfinite().all()
        with contextlib.suppress(RuntimeError):  # another user of the slot, whose own logits are NaN
            model(torch.tensor([[9] * 39 + [77]]), logits_to_keep=1)
        assert model.runtime.cache[0].values[0].isinf().any()
        assert torch.equal(next_user(), expected)
