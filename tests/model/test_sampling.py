"""Token sampling against a reference in numpy's float64, and against transformers' warpers."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from optimum_opt_trn.model.sampling import MAX_SUPPRESSED, running_sum, sample_tokens


LAST_UNIFORM = 1 - 2**-24  # the largest that torch.rand gives in float32


def sample(
    logits, top_k, top_p=1.0, temperature=1.0, min_p=0.0, uniforms=0.0, suppressed=(), max_topk=256
) -> torch.Tensor:
    """`sample_tokens` for rows that share their parameters."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    rows = logits.shape[0]
    ids = torch.full((rows, MAX_SUPPRESSED), -1, dtype=torch.int32)
    ids[:, : len(suppressed)] = torch.tensor(list(suppressed), dtype=torch.int32)
    params = torch.tensor([[top_k, top_p, temperature, min_p]], dtype=torch.float32).repeat(rows, 1)
    uniforms = torch.as_tensor(uniforms, dtype=torch.float32).expand(rows)
    return sample_tokens(logits, params, uniforms, ids, max_topk)


def reference_weights(logits: np.ndarray, top_k: int, top_p: float, temperature: float, min_p: float) -> np.ndarray:
    """What each place of one row, best first, weighs after temperature, top-k (with ties), top-p and min-p."""
    best = np.sort(logits.astype(np.float64))[::-1]
    weights = np.exp((best - best[0]) / temperature)
    weights[best < best[min(top_k, len(best)) - 1]] = 0
    before = np.concatenate([[0], np.cumsum(weights)[:-1]]) / weights.sum()
    weights[before >= top_p] = 0
    weights[weights < min_p] = 0
    return weights


# Halves, so that many tie.
tied_logits = st.lists(st.integers(-12, 12).map(lambda i: i / 2), min_size=1, max_size=24)
uniform = st.floats(0, LAST_UNIFORM, width=32)
ways = st.fixed_dictionaries(
    {
        "top_k": st.integers(2, 30),
        "top_p": st.sampled_from([0.05, 0.3, 0.611, 0.9, 0.99, 1.0]),
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.9, 20.0]),
        # No weight of halves over these temperatures is near any of them.
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.21, 1.0]),
    }
)


@settings(deadline=None, max_examples=300)
@given(tied_logits, ways, uniform)
def test_inverts_the_cumulative_distribution(logits, way, u):
    logits = np.array(logits)
    weights = reference_weights(logits, **way)
    share = weights.sum() * u
    ends = np.cumsum(weights)
    # A top_p that falls on a boundary is decided by rounding.
    full = reference_weights(logits, way["top_k"], 1.0, way["temperature"], 0.0)
    assume(np.abs(np.cumsum(full) / full.sum() - way["top_p"]).min() > 1e-5 or way["top_p"] == 1.0)

    token = int(sample(logits[None], uniforms=u, **way))
    value = logits[token]
    better, equal = logits > value, logits == value
    start = ends[better.sum() - 1] if better.any() else 0.0
    stop = ends[better.sum() + equal.sum() - 1]
    # Of tokens that tie, any may stand where the share falls.
    assert stop > start, "a token was drawn that is not kept"
    assert start - 1e-5 * ends[-1] <= share <= stop + 1e-5 * ends[-1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10000), st.integers(2, 60), ways)
def test_equals_transformers_warpers(seed, vocabulary, way):
    """A uniform number in the middle of each token's share of transformers' distribution draws that token."""
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(way["temperature"]), TopKLogitsWarper(way["top_k"])])
    if way["top_p"] < 1:
        warpers.append(TopPLogitsWarper(way["top_p"]))
    warpers.append(MinPLogitsWarper(way["min_p"]))
    probabilities, tokens = warpers(None, logits.clone()).double().softmax(-1)[0].sort(descending=True)
    middles = probabilities.cumsum(0) - probabilities / 2
    held = probabilities > 1e-4
    drawn = sample(logits.repeat(int(held.sum()), 1), uniforms=middles[held], **way)
    assert drawn.tolist() == tokens[held].tolist()
    # Nothing else is kept.
    many = sample(logits.repeat(500, 1), uniforms=torch.linspace(0, LAST_UNIFORM, 500), **way)
    assert set(many.tolist()) <= set(tokens[probabilities > 0].tolist())


@pytest.mark.parametrize("top_k", [2, 3])
def test_top_k_keeps_ties_as_transformers_does(top_k):
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, -1.0]])
    kept = TopKLogitsWarper(top_k)(None, logits).isfinite()[0].nonzero().flatten().tolist()
    drawn = sample(logits.repeat(1000, 1), top_k=top_k, uniforms=torch.linspace(0, LAST_UNIFORM, 1000))
    assert sorted(set(drawn.tolist())) == kept == [1, 2, 3, 4]


@settings(deadline=None, max_examples=150)
@given(st.lists(tied_logits, min_size=1, max_size=1), uniform, st.sampled_from([1, 2, 5, 256]))
def test_greedy_is_argmax(rows, u, max_topk):
    logits = torch.tensor(rows, dtype=torch.float32)
    token = sample(logits, top_k=1, uniforms=u, max_topk=max_topk)
    assert token.dtype == torch.int32
    assert token.tolist() == logits.argmax(-1).tolist()


def test_greedy_is_argmax_on_a_large_vocabulary_with_ties():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 5, (8, 5000), generator=generator).float()
    assert torch.equal(sample(logits, top_k=1).long(), logits.argmax(-1))


@settings(deadline=None, max_examples=100)
@given(tied_logits, st.sets(st.integers(0, 23), max_size=MAX_SUPPRESSED), st.integers(1, 30), uniform)
@example([0.0] * 9 + [2.0], {0, 1, 2, 3}, 7, LAST_UNIFORM)  # sums in two orders differ by rounding
def test_suppressed_ids_are_never_selected(logits, suppressed, top_k, u):
    left = [i for i in range(len(logits)) if i not in suppressed]
    assume(left)
    token = int(sample([logits], top_k=top_k, uniforms=u, suppressed=sorted(suppressed)))
    # The ids that the row does not have, and the fill of -1, exclude nothing.
    assert token in left
    # What is left is drawn from as if it were all.
    among = int(sample([[logits[i] for i in left]], top_k=top_k, uniforms=u))
    assert logits[token] == logits[left[among]]


def test_rows_have_their_own_parameters():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(5, 1)
    params = torch.tensor([[1, 1.0, 1.0, 0], [2, 1.0, 1.0, 0], [4, 1.0, 1.0, 0], [4, 0.1, 1.0, 0], [4, 1.0, 1e-4, 0]])
    suppressed = torch.full((5, MAX_SUPPRESSED), -1, dtype=torch.int32)
    last = torch.full((5,), LAST_UNIFORM)
    assert sample_tokens(logits, params, last, suppressed, 256).tolist() == [1, 3, 0, 1, 1]
    suppressed[0, 3] = 1
    assert sample_tokens(logits, params, last, suppressed, 256).tolist() == [3, 3, 0, 1, 1]


@pytest.mark.parametrize("uniforms", [0.0, LAST_UNIFORM, 0.5, 2**-24])
def test_edge_uniforms_select_a_kept_token(uniforms):
    """Also where far tokens weigh nothing in float32, and where sums of many weights round."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(200, 700, generator=generator) * torch.logspace(-2, 3, 200)[:, None]
    tokens = sample(spread, top_k=256, uniforms=uniforms, max_topk=256)
    weights = (spread - spread.amax(-1, keepdim=True)).exp().gather(1, tokens.long()[:, None])
    assert (weights > 0).all()
    kth = spread.topk(256).values[:, -1:]
    assert (spread.gather(1, tokens.long()[:, None]) >= kth).all()
    if uniforms == 0:
        assert torch.equal(tokens.long(), spread.argmax(-1))
    flat = sample(torch.zeros(3, 256), top_k=256, uniforms=uniforms)
    assert ((flat >= 0) & (flat < 256)).all()


def test_last_uniform_draws_the_last_kept_token():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert sample(logits, top_k=4, uniforms=LAST_UNIFORM).item() == 0
    assert sample(logits, top_k=3, uniforms=LAST_UNIFORM).item() == 1
    assert sample(logits, top_k=4, top_p=0.7, uniforms=LAST_UNIFORM).item() == 2
    assert sample(logits, top_k=4, top_p=1e-6, uniforms=LAST_UNIFORM).item() == 3


@pytest.mark.parametrize(("max_topk", "possible"), [(1, {5}), (3, {3, 4, 5}), (6, set(range(6))), (99, set(range(6)))])
def test_max_topk_bounds_the_choice(max_topk, possible):
    """Beyond it nothing is looked at; a vocabulary smaller than it is no error."""
    logits = torch.arange(6.0).repeat(2000, 1) / 4
    drawn = sample(logits, top_k=50, uniforms=torch.linspace(0, LAST_UNIFORM, 2000), max_topk=max_topk)
    assert set(drawn.tolist()) == possible


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 50.0, 1e4])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[-3.0, 0.0, 2.0, 1.9]]).repeat(400, 1)
    drawn = sample(logits, top_k=4, temperature=temperature, uniforms=torch.linspace(0, LAST_UNIFORM, 400))
    counts = torch.bincount(drawn, minlength=4)
    expected = (logits[0].double() / temperature).softmax(-1) * 400
    torch.testing.assert_close(counts.double(), expected, atol=1.5, rtol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(12, 1.0, 1.0), (12, 1.0, 0.6), (5, 1.0, 1.3), (12, 0.8, 1.0), (7, 0.9, 1.5)]
)
def test_distribution_is_that_of_transformers(top_k, top_p, temperature):
    """A chi-square test on 20,000 draws with torch's default generator."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    expected = LogitsProcessorList(warpers)(None, logits.clone()).double().softmax(-1)[0]
    draws = 20000
    tokens = sample(logits.repeat(draws, 1), top_k, top_p, temperature, uniforms=torch.rand(draws))
    counts = torch.bincount(tokens, minlength=12)
    kept = expected > 0
    assert not counts[~kept].any()
    result = scipy.stats.chisquare(counts[kept], draws * expected[kept] / expected.sum())
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("width", [1, 2, 3, 128, 255, 256])
def test_running_sum(width):
    x = torch.rand(3, width, generator=torch.Generator().manual_seed(width))
    expected = np.cumsum(x.numpy().astype(np.float64), axis=1)
    np.testing.assert_allclose(running_sum(x).numpy(), expected, rtol=1e-6)
    assert torch.equal(running_sum(torch.ones(1, width)), torch.arange(1.0, width + 1)[None])
