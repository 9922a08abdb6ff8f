"""Who selects tokens: the choice, and that both give the same wherever both could."""

from __future__ import annotations

import logging

import pytest
import torch
from against_transformers import generate, pair, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, set_seed
from transformers.generation.logits_process import (
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from optimum_opt_trn.generation.samplers import DeviceSampler, HostSampler, device_refusal, make_sampler
from optimum_opt_trn.model.sampling import sample_tokens


MAX_TOPK = 20
VOCABULARY = 40


def ends(*ids: int) -> Tensor:
    return torch.tensor(ids)


# Every processor that the device does, in its order.
DEVICE = {
    "min_length": MinLengthLogitsProcessor(6, ends(3, 4)),
    "min_new_tokens": MinNewTokensLengthLogitsProcessor(3, 4, ends(3, 5)),
    "temperature": TemperatureLogitsWarper(1.6),
    "top_k": TopKLogitsWarper(9),
    "top_p": TopPLogitsWarper(0.8),
    "min_p": MinPLogitsWarper(0.05),
    "renormalize": LogitNormalization(),
}


@settings(max_examples=60, deadline=None)
@given(
    names=st.sets(st.sampled_from([name for name in DEVICE if name != "top_k"])),
    do_sample=st.booleans(),
    width=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_device_and_host_select_the_same(names, do_sample, width, seed):
    processors = LogitsProcessorList(p for name, p in DEVICE.items() if name in names or name == "top_k")
    config = GenerationConfig(do_sample=do_sample)
    assert device_refusal(processors, config, MAX_TOPK) is None
    logits = 2 * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    input_ids = torch.zeros(5, width, dtype=torch.long)
    chosen = []
    for sampler in (DeviceSampler(processors, config), HostSampler(processors, config)):
        set_seed(seed)
        steps = []
        for _ in range(3):  # numbers drawn at one step must not shift those of the next
            sampling = sampler.inputs(5, width)
            tokens = sample_tokens(logits, sampling.params, sampling.uniforms, sampling.suppressed, MAX_TOPK)
            steps.append(sampler.next_tokens(input_ids, tokens, logits))
            assert steps[-1].dtype == torch.int64
        chosen.append(torch.stack(steps))
    assert torch.equal(*chosen)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 30},
        {"do_sample": True, "top_k": 12, "top_p": 0.8, "temperature": 1.4, "min_p": 0.01},
        {"do_sample": True, "min_new_tokens": 8, "num_return_sequences": 2},
        {"do_sample": False, "min_length": 12},
        {"do_sample": True, "top_k": 128},
    ],
)
def test_a_seed_gives_the_same_sequences_on_device_and_host(options, caplog):
    ours, _ = pair("pre_norm", 2, 6)
    options = {**ragged([4, 1, 6]), "max_new_tokens": 12, "eos_token_id": [7, 20, 33], "pad_token_id": 1, **options}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    with caplog.at_level(logging.DEBUG, logger="optimum_opt_trn.generation.samplers"):
        caplog.clear()
        on_device = generate(ours, options, seed=3)
        assert caplog.messages == ["Tokens are sampled on the device."]
        on_host = generate(ours, {**options, **scores}, seed=3)
    (message,) = caplog.messages[1:]
    assert message.startswith("Tokens are sampled on the host: output_scores was asked for, and ")
    assert torch.equal(on_device, on_host.sequences)


class Nothing(LogitsProcessor):
    """Changes nothing, which nobody knows: it runs on the host."""

    def __call__(self, input_ids, scores):
        return scores


class OwnTemperature(TemperatureLogitsWarper):
    """Might do anything."""


SAMPLE = {"do_sample": True}
REASONS: dict[str, tuple[list[LogitsProcessor], dict, str]] = {
    "scores": ([TopKLogitsWarper(5)], {**SAMPLE, "return_dict_in_generate": True, "output_scores": True}, "output_s"),
    "another": ([RepetitionPenaltyLogitsProcessor(1.2)], {}, "RepetitionPenaltyLogitsProcessor is not done"),
    "a subclass": ([OwnTemperature(1.2), TopKLogitsWarper(5)], SAMPLE, "OwnTemperature is not done"),
    "order": ([TopKLogitsWarper(5), TemperatureLogitsWarper(2.0)], SAMPLE, "TemperatureLogitsWarper comes after TopK"),
    "twice": ([TopKLogitsWarper(5), TopKLogitsWarper(6)], SAMPLE, "TopKLogitsWarper comes after TopKLogitsWarper"),
    "filter": ([TopKLogitsWarper(5, filter_value=-9.0)], SAMPLE, "TopKLogitsWarper has a filter_value"),
    "several": ([TopPLogitsWarper(0.5, min_tokens_to_keep=2)], SAMPLE, "TopPLogitsWarper keeps several"),
    "top_k 0": ([], SAMPLE, "top_k=0 is not within the 20"),
    "top_k large": ([TopKLogitsWarper(21)], SAMPLE, "top_k=21 is not within the 20"),
    "ends": ([MinLengthLogitsProcessor(5, torch.arange(9))], {}, "9 end-of-sequence ids.*can do 8"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_the_host_selects(case, caplog):
    processors, options, reason = REASONS[case]
    with caplog.at_level(logging.DEBUG, logger="optimum_opt_trn.generation.samplers"):
        sampler = make_sampler(LogitsProcessorList(processors), GenerationConfig(**options), MAX_TOPK)
    assert isinstance(sampler, HostSampler)
    assert reason.split(".*")[0] in caplog.text and reason.split(".*")[-1] in caplog.text


def test_what_the_device_serves():
    config = GenerationConfig(do_sample=True)
    assert isinstance(make_sampler(LogitsProcessorList(DEVICE.values()), config, MAX_TOPK), DeviceSampler)
    # As many as are looked at; and greedy search needs no top_k, nor are scores kept that nobody can see.
    assert device_refusal(LogitsProcessorList([TopKLogitsWarper(MAX_TOPK)]), config, MAX_TOPK) is None
    assert device_refusal(LogitsProcessorList(DEVICE.values()), GenerationConfig(output_scores=True), MAX_TOPK) is None
    # Raw logits come from there; so do scores that no processor changes.
    kept = GenerationConfig(return_dict_in_generate=True, output_logits=True)
    assert device_refusal(LogitsProcessorList(DEVICE.values()), kept, MAX_TOPK) is None
    kept.output_scores = True
    assert device_refusal(LogitsProcessorList(), kept, MAX_TOPK) is None


def test_the_device_s_logits_are_kept_as_the_host_s():
    ours, _ = pair("pre_norm", 2, 6)
    options = {**ragged([4, 1, 6]), "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    for more, kept in (({"do_sample": True, "top_k": 9}, ["logits"]), ({"output_scores": True}, ["logits", "scores"])):
        on_device = generate(ours, {**options, **more}, seed=3)
        on_host = generate(ours, {**options, **more, "logits_processor": LogitsProcessorList([Nothing()])}, seed=3)
        assert torch.equal(on_device.sequences, on_host.sequences)
        for name in kept:
            assert torch.equal(torch.stack(on_device[name]), torch.stack(on_host[name]))


def test_the_device_is_told_what_was_asked_for():
    sampler = DeviceSampler(LogitsProcessorList(DEVICE.values()), GenerationConfig(do_sample=True))
    for width, suppressed in ((3, {3, 4, 5}), (5, {3, 4, 5}), (6, {3, 5}), (7, set())):
        sampling = sampler.inputs(2, width)
        torch.testing.assert_close(sampling.params, torch.tensor([[9, 0.8, 1.6, 0.05]] * 2))
        assert {*sampling.suppressed[0].tolist()} - {-1} == suppressed
        assert sampling.uniforms.shape == (2,)
    greedy = DeviceSampler(LogitsProcessorList(DEVICE.values()), GenerationConfig()).inputs(2, 3)
    assert greedy.params[:, 0].tolist() == [1, 1]


def test_greedy_draws_no_numbers():
    set_seed(0)
    expected = torch.rand(3)
    set_seed(0)
    DeviceSampler(LogitsProcessorList(), GenerationConfig()).inputs(3, 1)
    config = GenerationConfig()
    HostSampler(LogitsProcessorList(), config).next_tokens(
        torch.zeros(3, 1), torch.zeros(3), torch.randn(3, 9).clone()
    )
    set_seed(0)
    assert torch.equal(torch.rand(3), expected)


def test_host_keeps_scores_and_raw_logits_apart():
    config = GenerationConfig(return_dict_in_generate=True, output_scores=True, output_logits=True)
    sampler = HostSampler(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)]), config)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens = sampler.next_tokens(torch.tensor([[1]]), torch.tensor([0]), logits)
    assert tokens.tolist() == [2]
    assert sampler.scores[0].tolist() == [[1.0, 1.5, 2.0]] and sampler.raw_logits[0].tolist() == [[1.0, 3.0, 2.0]]


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_nothing_to_sample_is_an_error(value):
    sampler = HostSampler(LogitsProcessorList(), GenerationConfig(do_sample=True))
    with pytest.raises(ValueError, match="nothing to sample"):
        sampler.next_tokens(torch.zeros(1, 1), torch.zeros(1), torch.full((1, 4), value))
