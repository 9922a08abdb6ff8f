"""fc1's products that an int8 copy screens (csrc/screened.h): the same bits, with fewer rows of the weights read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from against_transformers import norms, random
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import KINDS, tiny_opt
from torch import Tensor

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.targets.cpu.int8_copy import Screen, int8_copy
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic, LayerNorm, variants


arithmetics = st.builds(
    KernelArithmetic, variant=st.sampled_from(variants()), least_integer_rows=st.sampled_from([1, 16])
)
every_variant = pytest.mark.parametrize("variant", variants())
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def matrices(seed: int, n: int, k: int, shards: int, dtype: torch.dtype, shift: float) -> tuple[list[Tensor], ...]:
    """Weights and biases of some shards; the lower the shift, the fewer results are above 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(n, k, generator=generator) / k**0.5).to(dtype) for _ in range(shards)]
    return weights, [(torch.randn(n, generator=generator) / 10 + shift).to(dtype) for _ in range(shards)]


def rows(seed: int, m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=200)
@given(
    arithmetics,
    st.integers(1, 6),
    st.sampled_from([1, 15, 64, 200, 768, 1024, 1031, 2048]) | st.integers(1, 300),
    st.sampled_from([1, 23, 24, 25, 96, 200]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(DTYPES),
    st.sampled_from([-3.0, -1.5, 0.0, 2.0]),
    st.booleans(),
    norms,
    st.integers(0, 5),
)
def test_results_are_those_of_the_weights(arithmetic, m, k, n, shards, dtype, shift, biased, norm, seed):
    weights, biases = matrices(seed, n, k, shards, dtype, shift)
    x, screen = rows(seed, m, k) * 10.0 ** (seed - 2), screen_of(weights)
    norm = norm and LayerNorm(*((random(8, k), random(9, k)) if norm == "affine" else (None, None)))
    given_biases = biases if biased else None
    expected = arithmetic.linears(x, weights, given_biases, relu=True, norm=norm)
    for _ in range(3):  # with the copies, and perhaps without
        found = arithmetic.screened(x, weights, given_biases, screen, norm)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def screen_of(weights: list[Tensor]) -> Screen:
    return Screen([int8_copy(weight) for weight in weights])


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_rows_that_give_0_are_not_read(variant, dtype, m):
    """NaN would show it."""
    weights, biases = matrices(0, 500, 1024, 2, dtype, -1.8)
    arithmetic, x, screen = KernelArithmetic(variant=variant), rows(m, m, 1024), screen_of(weights)
    exact = [weight.double() for weight in weights]
    sums = [x.double() @ weight.T + bias.double() for weight, bias in zip(exact, biases, strict=True)]
    expected = arithmetic.linears(x, weights, biases, relu=True)
    for weight, total, copy in zip(weights, sums, screen.copies, strict=True):
        # What is further below 0 than the copy can be off, twice: by the weight's sum, and by the copy's.
        sure = (total + 2.1 * copy.bounds().double() * x.double().norm(dim=1)[:, None] < 0).all(0)
        assert sure.double().mean() > 0.3
        weight[sure] = float("nan")
    found = arithmetic.screened(x, weights, biases, screen, None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert arithmetic.linears(x, weights, biases, relu=True)[0].isnan().any()
    assert int(screen.without) == 0


@every_variant
def test_calls_go_without_copies_that_save_nothing(variant):
    weights, biases = matrices(0, 300, 256, 1, torch.float16, 0.0)
    arithmetic, x, screen = KernelArithmetic(variant=variant), rows(0, 1, 256), screen_of(weights)
    expected = arithmetic.linears(x, weights, biases, relu=True)[0]
    counted = []
    for _ in range(70):
        assert torch.equal(arithmetic.screened(x, weights, biases, screen, None)[0], expected)
        counted.append(int(screen.without))
    assert counted[0] > 0 and counted[:64] == [*range(counted[0], -1, -1)] and counted[64] == counted[0]
    fewer = [bias - 2 for bias in biases]  # now they would save something
    screen.without.zero_()
    arithmetic.screened(x, weights, fewer, screen, None)
    assert int(screen.without) == 0


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-38, 0.0])
def test_inputs_of_any_size(variant, value):
    arithmetic = KernelArithmetic(variant=variant)
    for m in (1, 2):
        weights, biases = matrices(m, 100, 300, 1, torch.float16, -2.0)
        x = rows(m, m, 300)
        x[0, 7] = value
        x[-1] = value
        expected = arithmetic.linears(x, weights, biases, relu=True)[0]
        found = arithmetic.screened(x, weights, biases, screen_of(weights), None)[0]
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def test_refused():
    weights, biases = matrices(0, 8, 16, 2, torch.float16, 0.0)
    arithmetic, x = KernelArithmetic(), rows(0, 1, 16)
    with pytest.raises(ValueError, match="shorter"):
        arithmetic.screened(x, weights, biases, screen_of(weights[:1]), None)
    with pytest.raises(RuntimeError, match="the copy of a weight is not of 8 outputs"):
        arithmetic.screened(x, weights, biases, screen_of([weights[0], weights[1][:7]]), None)
    with pytest.raises(RuntimeError, match="16 inputs"):
        arithmetic.screened(x, weights, biases, screen_of([weight[:, :15] for weight in weights]), None)


CASES = [(kind, degree, "f16") for kind in KINDS for degree in (1, 2, 4)]


@pytest.mark.parametrize(("kind", "tp_degree", "amp"), [*CASES, ("pre_norm", 1, "bf16"), ("pre_norm", 2, "f32")])
def test_a_model_computes_the_same(kind, tp_degree, amp, save_opt):
    """Whether or not units that are 0 are skipped, in steps of one and two rows."""
    path = save_opt(tiny_opt(**KINDS[kind]))
    options = {"batch_size": 2, "sequence_length": 40, "tp_degree": tp_degree, "amp": amp}
    model, whole = (NeuronOPTForCausalLM.from_pretrained(path, **options) for _ in range(2))
    if model.config.activation_function != "relu":
        assert model.runtime.captured is None  # nothing is 0 for sure
        return
    screens, captured = model.runtime.captured._screens, whole.runtime.captured
    assert len(screens) == model.config.num_hidden_layers and all(len(s.copies) == tp_degree for s in screens)
    captured._arithmetic = replace(captured._arithmetic, skip_zeros=False)
    for screen in screens:
        for copy in screen.copies:
            assert copy.weight.shape[0] * tp_degree == model.config.ffn_dim
    for count in (1, 2):
        ids = torch.randint(4, 128, (count, 5), generator=torch.Generator().manual_seed(count))
        asked = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
        asked.update(return_dict_in_generate=True, output_logits=True)
        found, expected = model.generate(ids, **asked), whole.generate(ids, **asked)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_no_copies_are_read_where_memory_is_short(save_opt, tmp_path, monkeypatch):
    """Of what prompts read and of the copies, parts would be read from the disk in turns."""
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), batch_size=2, sequence_length=40)
    weights, tensors = model.runtime.weights, {}  # the tied head once
    for part in (weights.embed, weights.head, *weights.layers):
        tensors.update({tensor.data_ptr(): tensor.nbytes for shards in part.values() for tensor in shards})
    copies = [copy.weight.nbytes for screen in model.runtime.captured._screens for copy in screen.copies]
    needed = sum(tensors.values()) + sum(copies)
    model.save_pretrained(tmp_path / "out")
    for available, expected in ((needed, 2), (needed - 1, 0)):
        monkeypatch.setattr("optimum_opt_trn.targets.cpu.host_memory", lambda given=available: (1 << 40, given))
        assert len(NeuronOPTForCausalLM.from_pretrained(tmp_path / "out").runtime.captured._screens) == expected


def test_an_export_has_the_copies(save_opt, tmp_path):
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), batch_size=2, sequence_length=40)
    model.save_pretrained(tmp_path / "out")
    for index in range(model.config.num_hidden_layers):
        stored = load_file(tmp_path / "out" / "compiled" / f"layer_{index:03}.safetensors")
        weights = load_file(tmp_path / "out" / "checkpoint" / f"layer_{index:03}.safetensors")
        copy = int8_copy(weights[f"model.decoder.layers.{index}.fc1.weight"])
        names = ("weight_int8", "weight_scale", "error", "length")
        for name, tensor in zip(names, vars(copy).values(), strict=True):
            assert torch.equal(stored[f"fc1.{name}"], tensor)


def test_an_int8_export_has_none(save_opt, tmp_path):
    options = {"batch_size": 2, "sequence_length": 40, "weight_dtype": "int8"}
    model = NeuronOPTForCausalLM.from_pretrained(save_opt(tiny_opt()), **options)
    model.save_pretrained(tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "compiled" / "layer_000.safetensors")) == ["fc2.weight_by_unit"]
    assert not model.runtime.captured._screens
