"""Layers whose calls were captured, against the same layers called from Python: equal to the bit."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.model.sampling import SamplingInputs
from optimum_opt_trn.targets.base import Inner, Step
from optimum_opt_trn.targets.cpu.captured import MOST_TOKENS, CapturedLayers
from optimum_opt_trn.targets.cpu.kernels import VARIANT_VARIABLE, KernelArithmetic, variants
from optimum_opt_trn.targets.cpu.runtime import CPURuntime


SLOTS, LENGTH = 3, 160


@pytest.fixture
def load(save_opt):
    """Loads a model twice: as it is, and calling each kernel from Python."""

    def load(kind: str = "pre_norm", name: str = "source", **options) -> tuple[CPURuntime, CPURuntime]:
        options = {"batch_size": SLOTS, "sequence_length": LENGTH, **options}
        path = save_opt(tiny_opt(num_hidden_layers=3, **KINDS[kind]), name)
        ours, direct = (NeuronOPTForCausalLM.from_pretrained(path, **options).runtime for _ in range(2))
        direct.captured = None
        return ours, direct

    return load


class Steps:
    """Random tokens that go to slots where those before them ended."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.filled = [0] * SLOTS

    def next(self, counts: list[int], inner: Inner | None = None) -> Step:
        """So many tokens for each slot; a slot that is full begins again."""
        self.filled = [0 if at + n > LENGTH else at for at, n in zip(self.filled, counts, strict=True)]
        slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
        places = [at + i for at, count in zip(self.filled, counts, strict=True) for i in range(count)]
        self.filled = [at + n for at, n in zip(self.filled, counts, strict=True)]
        tokens = torch.randint(4, 128, (len(slots),), generator=self.generator, dtype=torch.int32)
        sampling = SamplingInputs.greedy(sum(count > 0 for count in counts))
        step = Step(tokens, torch.tensor(slots), torch.tensor(places), torch.arange(len(slots)), sampling)
        return step if inner is None else Step(**{**vars(step), "inner": inner})


def check(ours: CPURuntime, direct: CPURuntime, steps: list[Step]) -> None:
    results = []
    for step in steps:
        result, expected = ours.step(step), direct.step(step)
        assert torch.equal(result.logits, expected.logits)
        assert torch.equal(result.tokens, expected.tokens)
        results.append((result.logits, expected.logits))
    # What a step returned is not what later steps write to.
    assert all(torch.equal(*pair) for pair in results)


def captured_counts(runtime: CPURuntime) -> set[int]:
    return set(runtime.captured._captures)


CASES = [
    *((kind, 2, {}) for kind in KINDS),
    *(("pre_norm", degree, {"weight_dtype": "int8"}) for degree in (1, 2, 4)),
    *(("post_norm", 4, {"amp": amp}) for amp in ("bf16", "f32")),
]


@pytest.mark.parametrize(("kind", "tp_degree", "options"), CASES)
def test_equals_calls_from_python(kind, tp_degree, options, load):
    ours, direct = load(kind, tp_degree=tp_degree, **options)
    steps = Steps(0)
    prompts = [[5, 0, 0], [0, 17, 3]]
    for counts in (*prompts, [1, 1, 1], [1, 1, 1], *prompts, [1, 16, 1], [1, 1, 1], [1, 0, 1], [1, 16, 1]):
        check(ours, direct, [steps.next(counts)])
    if kind == "galactica":  # torch computes its activation
        assert ours.captured is None
    else:
        assert captured_counts(ours) == {5, 20, 3, 18, 2}


@pytest.mark.parametrize("variant", variants())
def test_by_every_variant(variant, load, monkeypatch):
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    ours, direct = load()
    steps = Steps(1)
    check(ours, direct, [steps.next(counts) for counts in ([40, 0, 8], [1, 1, 1], [1, 1, 1], [8, 0, 40])])
    assert captured_counts(ours) == {48, 3}


def test_captures_with_the_options_of_the_arithmetic(load):
    ours, _ = load(weight_dtype="int8")
    options = {"variant": variants()[-1], "skip_zeros": False, "least_integer_rows": 3}
    ours.captured._arithmetic = KernelArithmetic(**options)
    seen, run = [], KernelArithmetic._compute

    def noting(self, kernel, inputs, *arguments):
        seen.append({name: getattr(self, name) for name in options})
        run(self, kernel, inputs, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelArithmetic, "_compute", noting)
        ours.captured.hidden(2).fill_(1.0)
        ours.captured.run(Steps(7).next([2, 0, 0]))
    assert seen and all(one == options for one in seen)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_order_of_steps(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "source"
    tiny_opt().save_pretrained(path)
    options = {"batch_size": SLOTS, "sequence_length": LENGTH, "tp_degree": data.draw(st.sampled_from([1, 2]))}
    ours, direct = (NeuronOPTForCausalLM.from_pretrained(path, **options).runtime for _ in range(2))
    direct.captured = None
    steps = Steps(data.draw(st.integers(0, 9)))
    counts = st.lists(st.sampled_from([0, 1, 1, 2, 9, 30, 70]), min_size=SLOTS, max_size=SLOTS).filter(any)
    for one in data.draw(st.lists(counts, min_size=2, max_size=8)):
        torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
        check(ours, direct, [steps.next(one)])
    torch.set_num_threads(1)


def test_a_number_of_tokens_is_captured_once(load, monkeypatch):
    ours, direct = load()
    capture, calls = CapturedLayers._capture, []

    def counting(self, hidden, step):
        calls.append(len(hidden))
        return capture(self, hidden, step)

    monkeypatch.setattr(CapturedLayers, "_capture", counting)
    steps = Steps(2)
    check(ours, direct, [steps.next([1, 1, n]) for n in (0, 1, 1, 0, MOST_TOKENS - 2, 1, MOST_TOKENS - 1, 0)])
    assert calls == [2, 3, MOST_TOKENS]
    torch.set_num_threads(2)
    check(ours, direct, [steps.next([1, 1, 1])])
    torch.set_num_threads(1)
    assert calls == [2, 3, MOST_TOKENS, 3]


def test_precision_is_that_of_the_step(load):
    if not {"avx512_bf16", "avx512_amx"} & set(variants()):
        pytest.skip("this processor has no AVX-512 BF16")
    ours, direct = load(amp="bf16")
    steps = Steps(3)
    check(ours, direct, [steps.next([20, 0, 0])])
    torch.set_float32_matmul_precision("medium")
    try:
        medium = steps.next([20, 0, 0])
        check(ours, direct, [medium])
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = ours.step(medium).logits
    assert torch.equal(exact, direct.step(medium).logits)


def test_inner_results_are_computed_as_before(load):
    ours, direct = load()
    step = Steps(4).next([3, 2, 0], Inner(hidden_states=True))
    for mine, expected in zip(ours.step(step).hidden_states, direct.step(step).hidden_states, strict=True):
        assert torch.equal(mine, expected)
    assert not captured_counts(ours)


def test_a_copy_captures_anew(load):
    ours, direct = load()
    steps = Steps(5)
    check(ours, direct, [steps.next([4, 0, 0]), steps.next([1, 0, 0])])
    copied = copy.deepcopy(ours)
    assert not captured_counts(copied) and captured_counts(ours)
    step = steps.next([1, 0, 0])
    expected = direct.step(step).logits
    keys = ours.cache[0].keys[0].clone()
    assert torch.equal(copied.step(step).logits, expected)
    assert torch.equal(copied.step(step).logits, expected)
    assert torch.equal(ours.cache[0].keys[0], keys)
    assert torch.equal(ours.step(step).logits, expected)


def test_a_token_outside_the_cache_is_refused(load):
    ours, _ = load()
    greedy = SamplingInputs.greedy(1)

    def step(place: int) -> Step:
        return Step(torch.tensor([5], dtype=torch.int32), *torch.tensor([[0], [place], [0]]), greedy)

    ours.step(step(0))
    with pytest.raises(RuntimeError, match=f"token 0 is at slot 0, position {LENGTH}, outside the cache"):
        ours.step(step(LENGTH))
    ours.step(step(1))


def test_in_a_forked_process(load):
    ours, direct = load()
    steps = Steps(6)
    check(ours, direct, [steps.next([2, 1, 1]), steps.next([2, 1, 1])])
    step = steps.next([2, 1, 1])
    expected = direct.step(step).logits
    if (child := os.fork()) == 0:
        equal = False
        try:
            equal = torch.equal(ours.step(step).logits, expected)
        finally:
            os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_models_in_several_threads(load):
    """Each replays its own calls, with more threads than cores, and is dropped while some may be late."""
    before = torch.get_num_threads()
    right: list[int] = []

    def run(index: int, ours: CPURuntime, direct: CPURuntime) -> None:
        steps = Steps(index)
        for _ in range(60):
            step = steps.next([1, 2, 1])
            if torch.equal(ours.step(step).logits, direct.step(step).logits):
                right.append(index)

    torch.set_num_threads(6)
    callers = [threading.Thread(target=run, args=(i, *load(name=f"source{i}"))) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert sorted(right) == [0] * 60 + [1] * 60 + [2] * 60
