"""One call of generate() on both sides: transformers' OPT is the reference, and the judge of what may be sampled."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch
from hypothesis import strategies as st
from scipy.stats import chisquare
from small_models import KINDS, rounded, tiny_opt
from torch import Tensor
from transformers import LogitsProcessorList, OPTForCausalLM, StoppingCriteriaList, set_seed
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.model.arithmetic import Arithmetic, LayerNorm


# Of scores and logits, whose spread is about 1 in the random models: float32 rounding, and no more.
TOLERANCE = 1e-3


@functools.cache
def pair(
    kind: str = "pre_norm", tp_degree: int = 1, batch_size: int = 3, sequence_length: int = 64
) -> tuple[NeuronOPTForCausalLM, OPTForCausalLM]:
    """A random model of ours, eager and with a float32 cache, and transformers' on the same rounded weights."""
    source = tiny_opt(**KINDS[kind])
    with tempfile.TemporaryDirectory() as directory:
        source.save_pretrained(directory)
        ours = NeuronOPTForCausalLM.from_pretrained(
            directory,
            eager=True,
            batch_size=batch_size,
            tp_degree=tp_degree,
            sequence_length=sequence_length,
            kv_cache_dtype="f32",
        )
    return ours, rounded(source)


def ragged(lengths: list[int], vocab_size: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of these lengths, random and padded at the left with 1, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.ones(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(4, vocab_size, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(ours: Any, theirs: Any, batches: bool = False) -> None:
    """The same tokens, and where more was asked for, the same scores and beams.

    With `batches`, but for the rows of steps that their batch did not come to, whose scores are -inf.
    """
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert torch.equal(ours, theirs), f"{ours.tolist()}\n{theirs.tolist()}"
        return
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences), f"{ours.sequences.tolist()}\n{theirs.sequences.tolist()}"
    for name in ("scores", "logits"):
        mine, reference = ours.get(name), theirs.get(name)
        assert (mine is None) == (reference is None)
        for step, other in zip(mine or (), reference or (), strict=True):
            if batches:
                reached = ~step.eq(-torch.inf).all(dim=-1)
                step, other = step[reached], other[reached]
            torch.testing.assert_close(step, other, atol=TOLERANCE, rtol=1e-4)
    for name in ("sequences_scores", "beam_indices"):
        mine, reference = ours.get(name), theirs.get(name)
        assert (mine is None) == (reference is None)
        if reference is not None:
            torch.testing.assert_close(mine, reference, atol=TOLERANCE, rtol=1e-4)


def assert_same_inside(ours: Any, theirs: Any, mask: Tensor | None = None) -> None:
    """The same hidden states and attentions, as far as transformers returns them, of a call of the model or each step.

    Hidden states within 1e-3 of their standard deviation, attentions within 1e-5; 0 where there is no token.

    Args:
        ours, theirs: a ModelOutput each. transformers' attention is its eager one.
        mask: of the first columns, `(rows, width)`; None for all.
    """
    for name in ("hidden_states", "attentions"):
        mine, reference = ours.get(name), theirs.get(name)
        assert (mine is None) == (reference is None), name
        if reference is None:
            continue
        if isinstance(reference[0], Tensor):
            mine, reference = (mine,), (reference,)
        assert len(mine) == len(reference)
        for step, (layers, expected) in enumerate(zip(mine, reference, strict=True)):
            assert len(layers) == len(expected)
            for tensor, other in zip(layers, expected, strict=True):
                assert tensor.shape == other.shape and tensor.dtype == torch.float32
                if name == "attentions":
                    tensor, other = tensor.transpose(1, 2), other.transpose(1, 2)
                real = torch.ones(tensor.shape[:2], dtype=torch.bool)
                if step == 0 and mask is not None:
                    real = mask[:, -tensor.shape[1] :].bool()
                close = 1e-5 if name == "attentions" else 1e-3 * float(other[real].std())
                torch.testing.assert_close(tensor[real], other[real], atol=close, rtol=0)
                assert tensor[~real].eq(0).all()


def generate(model: GenerationMixin, options: dict[str, Any], seed: int = 0) -> Tensor | ModelOutput:
    """generate() from a seed, with options of its own: what is stateful in them is copied."""
    set_seed(seed)
    shared = ("assistant_model", "tokenizer", "assistant_tokenizer", "past_key_values")
    own = {name: value if name in shared else copy.deepcopy(value) for name, value in options.items()}
    return model.generate(**own)


def assert_possible(reference: GenerationMixin, sequences: Tensor, options: dict[str, Any]) -> None:
    """What was sampled has a probability under transformers' own scores, and ends where its criteria say so.

    The reference goes along the sequences, by the processors and criteria that it prepares for the same options.
    """

    def follow(
        model: OPTForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        attention_mask = kwargs["attention_mask"]
        if attention_mask is None:  # transformers 5 leaves out a mask of ones
            attention_mask = torch.ones_like(input_ids)
        assert torch.equal(sequences[:, : input_ids.shape[1]], input_ids)
        unfinished = torch.ones(len(sequences), dtype=torch.bool)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        for column in range(input_ids.shape[1], sequences.shape[1]):
            assert unfinished.any(), "it went on after its end"
            before, chosen = sequences[:, :column], sequences[:, column]
            mask = torch.nn.functional.pad(attention_mask, (0, column - input_ids.shape[1]), value=1)
            scores = logits_processor(before, model(before, attention_mask=mask).logits[:, -1])
            possible = scores.gather(1, chosen[:, None])[:, 0] > -torch.inf
            if ends:  # else transformers goes on with rows that a criterion has ended
                possible = torch.where(unfinished, possible, chosen == generation_config._pad_token_tensor)
            assert possible.all(), f"column {column}: {chosen.tolist()}"
            unfinished &= ~stopping_criteria(sequences[:, : column + 1], None)
        assert not unfinished.any(), "it ended too early"
        return sequences

    dropped = ("return_dict_in_generate", "output_scores", "output_logits")
    rest = {name: value for name, value in options.items() if name not in dropped}
    # An assertion in there must not look like a call that transformers refuses.
    with torch.no_grad():
        reference.generate(custom_generate=follow, **rest)


def assert_distributed(drawn: Tensor, scores: Tensor) -> None:
    """Tokens, integers `(draws,)`, are drawn as the softmax of scores `(vocabulary,)` has it: a chi-square test.

    Of right ones, one set of draws in a thousand fails; seeds are fixed.
    """
    probabilities, draws = torch.softmax(scores.double(), dim=-1), len(drawn)
    counts = torch.bincount(drawn, minlength=len(scores))
    assert counts[probabilities == 0].sum() == 0
    # Rare tokens together, so that no expected count is too small for the test.
    common = probabilities * draws >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    expected = [*(probabilities[common] * draws).tolist(), float(probabilities[~common].sum() * draws)]
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert chisquare(observed, expected).pvalue > 1e-3


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5) -> None:
    """`actual` is float32, and `exact`, float64, up to float32 rounding."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


# Whether x goes through a layernorm before, and whether that has weight and bias.
norms = st.sampled_from([None, "plain", "affine"])


def check_linears(arithmetic: Arithmetic, shape, k, ns, dtype, with_biases, relu, norm=None, view=0) -> None:
    """x `(*shape, k)`, weights `(n, k)`, which are views of more columns if `view`."""
    x = random(1, *shape, k)
    weights = [(random(2 + i, n, k + view) / k**0.5).to(dtype)[:, view:] for i, n in enumerate(ns)]
    biases = [random(9 + i, n, dtype=dtype) for i, n in enumerate(ns)] if with_biases else None
    parameters = LayerNorm(random(7, k), random(8, k)) if norm == "affine" else LayerNorm(None, None)
    results = arithmetic.linears(x, weights, biases, relu, parameters if norm else None)
    exact_x = x.double()
    if norm:  # which enlarges what rounding did to a row of numbers that are nearly equal
        exact_x = torch.nn.functional.layer_norm(exact_x, (k,), *(p if p is None else p.double() for p in parameters))
    for i, (result, weight) in enumerate(zip(results, weights, strict=True)):
        exact = exact_x @ weight.double().T + (0 if biases is None else biases[i].double())
        assert_rounded(result, exact.clamp(min=0) if relu else exact, 1e-4 if norm else 1e-5)


def check_linear_sum(arithmetic: Arithmetic, shape, ks, n, dtype, with_bias, with_residual, view=0) -> None:
    """xs `(*shape, k)`, weights `(n, k)`, as `check_linears`."""
    xs = [random(1 + i, *shape, k) / k**0.5 for i, k in enumerate(ks)]
    weights = [random(5 + i, n, k + view, dtype=dtype)[:, view:] for i, k in enumerate(ks)]
    bias = random(9, n, dtype=dtype) if with_bias else None
    residual = random(10, *shape, n) if with_residual else None
    exact = sum(x.double() @ weight.double().T for x, weight in zip(xs, weights, strict=True))
    exact = exact + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    assert_rounded(arithmetic.linear_sum(xs, weights, bias, residual), exact)
