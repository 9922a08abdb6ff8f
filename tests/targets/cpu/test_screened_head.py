"""Best tokens that an int8 copy of the head screens, against those of all logits: the same, ties included."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import KINDS, tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets.base import Step
from optimum_opt_trn.targets.cpu.kernels import VARIANT_VARIABLE, KernelArithmetic, variants
from optimum_opt_trn.targets.cpu.runtime import CPURuntime
from optimum_opt_trn.targets.cpu.screened_head import MOST_ROWS


SLOTS, LENGTH_OF_A_SLOT = 18, 40


@pytest.fixture
def load(save_opt):
    def load(kind: str = "pre_norm", name: str = "source", **options) -> CPURuntime:
        options = {"batch_size": SLOTS, "sequence_length": LENGTH_OF_A_SLOT, **options}
        path = save_opt(tiny_opt(**{"vocab_size": 500, **KINDS[kind]}), name)
        return NeuronOPTForCausalLM.from_pretrained(path, **options).runtime

    return load


def step(rows: int, seed: int = 0, count: int = 2, sampling: SamplingInputs | None = None, **options) -> Step:
    """The first tokens of so many slots, of which the last ones are sampled, without logits."""
    tokens = torch.randint(4, 128, (rows * count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    slots, places = torch.arange(rows).repeat_interleave(count), torch.arange(count).repeat(rows)
    wanted = torch.arange(count - 1, rows * count, count)
    options = {"logits": False, **options}
    return Step(tokens, slots, places, wanted, sampling or SamplingInputs.greedy(rows), **options)


def check(runtime: CPURuntime, rows: int, seed: int) -> None:
    """Screening gives the tokens that all logits give, and computes none of those that it returns."""
    screened, whole = runtime.step(step(rows, seed)), runtime.step(step(rows, seed, logits=True))
    assert screened.logits.shape == (0, whole.logits.shape[1]) and len(whole.logits) == rows
    assert torch.equal(screened.tokens, whole.tokens)
    assert torch.equal(screened.tokens, whole.logits.argmax(-1).int())


CASES = [
    *((kind, degree, {}) for kind in KINDS for degree in (1, 2, 4)),
    *(("odd_vocabulary", 4, {"amp": amp}) for amp in ("bf16", "f32")),
]


@pytest.mark.parametrize(("kind", "tp_degree", "options"), CASES)
def test_tokens_are_those_of_all_logits(kind, tp_degree, options, load):
    runtime = load(kind, tp_degree=tp_degree, **options)
    for seed, rows in enumerate([1, 2, 3, 8, MOST_ROWS] * 2):
        check(runtime, rows, seed)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("amp", ["f16", "bf16"])
def test_by_every_variant(variant, precision, amp, load, monkeypatch):
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    runtime, before = load(amp=amp), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for seed, rows in enumerate([1, 4, 5, 12, 16]):
            check(runtime, rows, seed)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_first_of_tokens_that_tie(load):
    runtime = load()
    tokens = runtime.step(step(8)).tokens
    later = set(tokens.tolist()) - {0, 1}
    assert later
    for token in later:
        twin = copy.deepcopy(runtime)
        for tensor in (twin.weights.head["lm_head.weight"][0], *vars(twin.screened_head._copy).values()):
            tensor[1] = tensor[token]  # an earlier word with the same row
        for errors in twin.screened_head._errors:
            errors[1] = errors[token]
        assert twin.step(step(8)).tokens.tolist() == [1 if one == token else one for one in tokens.tolist()]


def test_only_candidates_are_read(load):
    """NaN would show it."""
    runtime = load()
    tokens = runtime.step(step(1)).tokens
    logits = runtime.step(step(1, logits=True)).logits[0]
    poisoned = copy.deepcopy(runtime)
    poisoned.weights.head["lm_head.weight"][0][logits < logits.median()] = float("nan")
    assert torch.equal(poisoned.step(step(1)).tokens, tokens)
    assert poisoned.step(step(1, logits=True)).logits.isnan().any()


def test_what_is_not_screened(load):
    """Drawn tokens, suppressed ones, more rows, and hidden states that are not finite: all logits are computed."""
    runtime = load()
    drawn, suppressed = SamplingInputs.greedy(2), SamplingInputs.greedy(2)
    drawn.params[1, 0] = 5.0
    drawn.uniforms[1] = 0.99
    suppressed.suppressed[0, 0] = runtime.step(step(2)).tokens[0]
    for asked in (step(2, sampling=drawn), step(2, sampling=suppressed), step(MOST_ROWS + 1)):
        result, whole = runtime.step(asked), runtime.step(replace(asked, logits=True))
        assert len(result.logits) == len(asked.wanted) and torch.equal(result.tokens, whole.tokens)
    runtime.weights.head["final_layer_norm.weight"][0][3] = float("nan")
    assert len(runtime.step(step(2)).logits) == 2


def test_no_row_wants_a_token(load):
    """As with the first chunks of a prompt."""
    asked = step(2, sampling=SamplingInputs.greedy(0))
    result = load().step(replace(asked, wanted=torch.empty(0, dtype=torch.int64)))
    assert result.tokens.shape == (0,) and len(result.logits) == 0


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(variants()), st.integers(1, 20), st.integers(1, 300), st.integers(1, 40))
def test_candidates(data, variant, rows, words, most):
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Multiples of 1/8 with few bits: sums of them are exact.
    x = generator.integers(-40, 40, (rows, words)).astype(np.float32) / 8
    errors = generator.integers(0, 9, words).astype(np.float32) / 8
    factors = generator.integers(0, 5, rows).astype(np.float32)
    off = factors[:, None] * errors
    possible = x + off >= (x - off).max(1, keepdims=True)
    found = KernelArithmetic(variant=variant).candidates(*map(torch.from_numpy, (x, errors, factors)), most)
    expected = None if possible.sum(1).max() > most else np.flatnonzero(possible.any(0)).tolist()
    assert found == expected


def test_candidates_refuses():
    arithmetic, x = KernelArithmetic(), torch.zeros(2, 8)
    for errors, factors in ((torch.zeros(7), torch.zeros(2)), (torch.zeros(8), torch.zeros(2).double())):
        with pytest.raises(RuntimeError, match="not contiguous float32"):
            arithmetic.candidates(x, errors, factors, 4)


def test_generate_screens_unless_logits_are_asked_for(save_opt, monkeypatch):
    path = save_opt(tiny_opt(vocab_size=500))
    model, eager = (
        NeuronOPTForCausalLM.from_pretrained(path, batch_size=2, sequence_length=64, eager=eager)
        for eager in (False, True)
    )
    ids, asked = torch.tensor([[2, 17, 99], [2, 5, 6]]), []
    choose = type(model.runtime.screened_head).best
    monkeypatch.setattr(
        type(model.runtime.screened_head), "best", lambda self, hidden: asked.append(1) or choose(self, hidden)
    )
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": None}
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
    assert len(asked) == 6
    whole = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    assert len(asked) == 6 and torch.equal(whole.sequences, eager.generate(ids, **options))
    assert whole.logits[0].shape == (2, 500)


def test_an_export_has_the_copy(save_opt, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), batch_size=2, sequence_length=64)
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "compiled" / "embeddings_and_head.safetensors")
    head = load_file(tmp_path / "out" / "checkpoint" / "embeddings_and_head.safetensors")
    head = head["model.decoder.embed_tokens.weight"].float().numpy()
    scale = np.abs(head).max(1, keepdims=True) / np.float32(127)
    assert np.array_equal(stored["lm_head.weight_scale"].numpy(), scale)
    assert np.array_equal(stored["lm_head.weight_int8"].numpy(), np.rint(head / scale).astype(np.int8))
