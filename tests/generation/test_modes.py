"""Every mode of generate() against transformers' own, with a float32 cache: the same tokens, scores and beams."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from typing import Any

import pytest
import torch
import transformers
from against_transformers import assert_distributed, assert_possible, assert_same, generate, pair, ragged
from small_models import KINDS, SHIPPED_MODEL, rounded
from test_random_options import Shift, StopAt
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    OPTForCausalLM,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)
from transformers.generation import SynthIDTextWatermarkingConfig, WatermarkingConfig

from optimum_opt_trn import NeuronOPTForCausalLM, pipeline
from optimum_opt_trn.targets import Step, StepResult


ENDS = [7, 20, 33, 46, 59, 72, 85, 98]  # as many as the device can suppress; some rows come to one of them
GREEDY = {"max_new_tokens": 10, "eos_token_id": ENDS, "pad_token_id": 1, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def even_ids(batch: int, row: Tensor) -> list[int]:
    """A prefix_allowed_tokens_fn that depends on both of its arguments."""
    return list(range(4 + (batch + int(row[-1])) % 3, 128, 3))


# What each mode adds to GREEDY. All of these are deterministic, or drawn by transformers' own loop from its seed.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 3, **DETAILS},
    "beams that stop early": {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0},
    "beams that never stop early": {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20, "temperature": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[74], [113], [91], [46, 37]]},
    "min_new_tokens": {"min_new_tokens": 8},
    "min_length": {"min_length": 15},
    "min_length of many ends": {"min_length": 15, "eos_token_id": [*range(30, 60)]},
    "forced_eos_token_id": {"forced_eos_token_id": 44, "eos_token_id": None},
    "forced_bos_token_id": {"forced_bos_token_id": 44, "input_ids": torch.tensor([[5]]), "attention_mask": None},
    "sequence_bias": {"sequence_bias": {(74,): -6.0, (91, 74): 4.0}},
    "suppress_tokens": {"suppress_tokens": [74, 91, 113], "begin_suppress_tokens": [46, 92]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6)},
    "renormalize_logits": {"renormalize_logits": True, **DETAILS},
    "remove_invalid_values": {"remove_invalid_values": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": even_ids},
    "beams with prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": even_ids, "num_beams": 3},
    "guidance": {"guidance_scale": 1.8},
    "guidance without a cache": {"guidance_scale": 1.8, "use_cache": False},
    "scores and logits": DETAILS,
    "without a cache": {"use_cache": False},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
    "own processor": {"logits_processor": LogitsProcessorList([Shift()])},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([StopAt()])},
    "max_time": {"max_time": 600.0},
    "max_length": {"max_length": 13, "max_new_tokens": None},
}
ONE_PROMPT: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 24},
    "prompt lookup with scores": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, **DETAILS},
    "prompt lookup that samples": {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 5},
}


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_equals_transformers(mode, tp_degree):
    kind = [*KINDS][[*MODES].index(mode) % len(KINDS)]
    ours, reference = pair(kind, tp_degree, 9)
    for lengths in ([6], [2, 9], [4, 1, 7]):
        options = {**ragged(lengths), **GREEDY, **MODES[mode]}
        assert_same(generate(ours, options), generate(reference, options))


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("mode", ONE_PROMPT)
def test_lookup_equals_transformers(mode, tp_degree):
    ours, reference = pair("post_norm", tp_degree, 2)
    repetitive = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"input_ids": repetitive, **GREEDY, "eos_token_id": [3], **ONE_PROMPT[mode]}
    assert_same(generate(ours, options), generate(reference, options))


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("other", ["pre_norm", "untied"])
def test_assisted_equals_transformers(other, tp_degree, schedule):
    """By an assistant that always agrees and by one that seldom does, of ours and of transformers'."""
    ours, reference = pair("pre_norm", tp_degree, 2)
    options = {**ragged([5]), **GREEDY, "eos_token_id": None, "max_new_tokens": 20}
    expected = generate(reference, options)
    for assistant in pair(other, 1, 2):
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        for model in (ours, reference):
            assert_same(generate(model, {**options, "assistant_model": assistant}), expected)
    drawn = {**options, "assistant_model": pair(other, 1, 2)[1], "do_sample": True, "top_k": 10, **DETAILS}
    assert_same(generate(ours, drawn), generate(reference, drawn))


def test_a_model_assists_itself():
    ours, reference = pair("pre_norm", 1, 2)
    options = {**ragged([5]), **GREEDY}
    assert_same(generate(ours, {**options, "assistant_model": ours}), generate(reference, options))


@pytest.mark.parametrize("lengths", [[3], [3, 1, 4]])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}, {"use_cache": False}, {"do_sample": True, "top_k": 1}])
def test_guidance_by_negative_prompts(lengths, extra):
    ours, reference = pair("pre_norm", 2, 12)
    negative = ragged(lengths[::-1], seed=5)
    beams = extra.get("num_beams", 1)
    options = {
        **ragged(lengths),
        **GREEDY,
        "guidance_scale": 2.5,
        **extra,
        "negative_prompt_ids": negative["input_ids"].repeat_interleave(beams, dim=0),
        "negative_prompt_attention_mask": negative["attention_mask"].repeat_interleave(beams, dim=0),
    }
    assert_same(generate(ours, options), generate(reference, options))


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.5, "top_k": 0},
    "top_k and top_p": {"top_k": 9, "top_p": 0.6, "temperature": 1.8},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "no top_k": {"top_k": 0},
    "guidance": {"guidance_scale": 1.5, "top_k": 5},
    "scores": {"top_k": 5, **DETAILS},
    "own processor": {"top_k": 5, "logits_processor": LogitsProcessorList([Shift()])},
    "SynthID": {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=2),
        "top_k": 20,
    },
    "sequences": {"num_return_sequences": 4, "top_p": 0.7},
    "min_new_tokens": {"min_new_tokens": 9, "top_p": 0.9},
}


@pytest.mark.parametrize("mode", SAMPLED)
def test_samples_are_possible(mode):
    ours, reference = pair("odd_vocabulary", 2, 6)
    options = {**ragged([4, 1, 7]), **GREEDY, "do_sample": True, **SAMPLED[mode]}
    for seed in range(3):
        out = generate(ours, options, seed)
        assert_possible(reference, out if isinstance(out, Tensor) else out.sequences, options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 0, "typical_p": 0.7},
        {"top_k": 12, "min_p": 0.05, "repetition_penalty": 1.3},
        {"guidance_scale": 1.4, "top_p": 0.8},
        {"eta_cutoff": 0.02, "temperature": 1.4},
    ],
)
def test_the_host_draws_with_the_distribution_of_transformers(options):
    ours, reference = pair("pre_norm", 1, 250, 16)
    ids = torch.tensor([[9, 8, 7]])
    options = {"do_sample": True, "max_new_tokens": 1, "eos_token_id": None, "pad_token_id": 1, **options}
    set_seed(0)
    scores = reference.generate(ids, **options, output_scores=True, return_dict_in_generate=True).scores[0]
    set_seed(1)
    assert_distributed(ours.generate(ids, num_return_sequences=2000, **options)[:, -1], scores[0])


@pytest.mark.parametrize("mode", ["greedy", "beams returned", "guidance", "scores and logits", "min_length"])
@pytest.mark.parametrize("batch_size", [3, 6])
def test_batches_equal_one_batch(mode, batch_size):
    ours, reference = pair("galactica", 1, batch_size)
    options = {**ragged([4, 1, 7, 2, 5]), **GREEDY, **MODES[mode], "eos_token_id": None}
    assert_same(generate(ours, options), generate(reference, options))
    # Rows that end at different places: the scores of steps that a batch did not come to are -inf.
    options["eos_token_id"] = ENDS
    mine, theirs = generate(ours, options), generate(reference, options)
    if isinstance(theirs, Tensor):
        assert torch.equal(mine, theirs)
    else:
        assert torch.equal(mine.sequences, theirs.sequences)


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_compute_transition_scores(extra):
    ours, reference = pair("pre_norm", 1, 6)
    options = {**ragged([4, 7]), **GREEDY, "eos_token_id": None, **DETAILS, **extra}
    scores = []
    for model in (ours, reference):
        out = generate(model, options)
        indices = out.get("beam_indices")
        scores.append(model.compute_transition_scores(out.sequences, out.scores, indices, normalize_logits=True))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-4)


class CountedTokens:
    """How many tokens a model's runtime was given while this lasts."""

    def __init__(self, model: NeuronOPTForCausalLM, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        run = model.runtime.step

        def counted(step: Step) -> StepResult:
            self.count += len(step.tokens)
            return run(step)

        monkeypatch.setattr(model.runtime, "step", counted)


@pytest.mark.parametrize("then", [{}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True, "top_k": 1}])
@pytest.mark.parametrize("lengths", [[5], [3, 6]])
def test_a_conversation_encodes_new_tokens_alone(then, lengths, monkeypatch):
    if "prompt_lookup_num_tokens" in then and len(lengths) > 1:
        pytest.skip("transformers' lookup takes one prompt")
    ours, reference = pair("untied", 2, 3)
    said = ragged([2] * len(lengths), seed=9)["input_ids"]
    histories = []
    for model in (ours, reference):
        inputs = ragged(lengths)
        past = None
        for turn in range(3):
            counted = CountedTokens(ours, monkeypatch) if model is ours and turn else None
            options = {**inputs, **GREEDY, "eos_token_id": [3], **then, "return_dict_in_generate": True}
            if model is reference and transformers.__version__[0] == "5" and "prompt_lookup_num_tokens" in then:
                past = None  # there its lookup encodes once more what a given cache has, and finds other tokens
            out = generate(model, {**options, "past_key_values": past})
            past = out.past_key_values
            if counted and not then:
                assert counted.count == len(lengths) * (1 + 2 + 9)  # the last one's, what was said, and the answer
            inputs["input_ids"] = torch.cat([out.sequences, said], dim=1)
            new = inputs["input_ids"].shape[1] - inputs["attention_mask"].shape[1]
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        histories.append(out.sequences)
    assert torch.equal(*histories)


def test_beams_of_a_conversation():
    ours, reference = pair("pre_norm", 1, 6)
    results = []
    for model in (ours, reference):
        out = generate(model, {**ragged([5]), **GREEDY, "eos_token_id": None, "return_dict_in_generate": True})
        past = copy.deepcopy(out.past_key_values)
        past.batch_repeat_interleave(3)
        again = {"input_ids": out.sequences, "past_key_values": past, **GREEDY, "num_beams": 3, "eos_token_id": None}
        results.append(generate(model, again))
        # The first cache is as it was.
        alone = {"input_ids": out.sequences, "past_key_values": out.past_key_values, **GREEDY, "eos_token_id": None}
        results[-1] = torch.cat([results[-1], generate(model, alone)])
    assert torch.equal(*results)


# Options that are refused, some by transformers, after it has prepared the cache.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no room": ({"max_new_tokens": 64}, "do not fit the sequence_length=64"),
    "no tokenizer": ({"stop_strings": ["x"]}, "tokenizer"),
    "a processor": ({"repetition_penalty": -1.0}, "`penalty` has to be"),
    "chunks": ({"prefill_chunk_size": 0}, "prefill_chunk_size=0"),
    "a mask": (
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])},
        "attention_mask differs",
    ),
    "a mask of fewer columns": (
        {"input_ids": torch.full((2, 4), 9), "attention_mask": torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])},
        "attention_mask differs",
    ),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_forgets_nothing(case, beams):
    ours, reference = pair("pre_norm", 1, 8)
    inputs, new = ragged([5, 3]), torch.full((2, 2), 9)
    past = ours(**inputs).past_key_values
    past.batch_repeat_interleave(beams)
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1),
    }
    # The last of the prompts' tokens are forgotten.
    fewer = {**whole, "attention_mask": whole["attention_mask"].index_fill(1, torch.tensor([4]), 0)}
    options = {**GREEDY, "num_beams": beams, "eos_token_id": None}
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        generate(ours, {**options, **fewer, **arguments, "past_key_values": past})
    assert past.get_seq_length() == 5 and past.lengths.tolist() == [5] * beams + [3] * beams
    for asked in (whole, fewer):
        mine = generate(ours, {**options, **asked, "past_key_values": copy.deepcopy(past)})
        assert torch.equal(mine, generate(reference, {**options, **asked}))


def test_a_cache_of_more_columns_than_the_prompt_is_cut_or_refused():
    ours, reference = pair("pre_norm", 1, 3)
    inputs = ragged([6, 4])
    past = ours(**inputs).past_key_values
    holed = {name: tensor[:, :5] for name, tensor in inputs.items()}
    holed["attention_mask"] = holed["attention_mask"].index_fill(1, torch.tensor([2]), 0)
    with pytest.raises(ValueError, match="attention_mask differs"):
        generate(ours, {**holed, **GREEDY, "past_key_values": past})
    assert past.lengths.tolist() == [6, 4]
    shorter = {name: tensor[:, :5] for name, tensor in inputs.items()}
    expected = generate(reference, {**shorter, **GREEDY})
    assert torch.equal(generate(ours, {**shorter, **GREEDY, "past_key_values": past}), expected)


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_change_nothing(chunk, side):
    ours, _ = pair("pre_norm", 1, 3)
    inputs = ragged([2, 9, 5])
    if side == "right":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    options = {**inputs, **GREEDY}
    assert torch.equal(generate(ours, {**options, "prefill_chunk_size": chunk}), generate(ours, options))


def test_max_time_ends_batches_too():
    ours, _ = pair("pre_norm", 1, 3)
    options = {**ragged([2] * 7), **GREEDY, "eos_token_id": None, "max_time": 0.0}
    assert generate(ours, options).shape == (7, 3)


def test_a_loop_of_the_callers_own():
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        if hasattr(model, "_get_initial_cache_position"):  # transformers 4.57
            kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, kwargs)
            new = {}
        else:
            new = {"next_sequence_length": None}
        while not stopping_criteria(input_ids, None).all():
            inputs = model.prepare_inputs_for_generation(input_ids, **new, **kwargs)
            new = dict.fromkeys(new, 1)
            outputs = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            scores = logits_processor(input_ids, outputs.logits[:, -1])
            input_ids = torch.cat([input_ids, scores.argmin(-1)[:, None]], dim=1)
        return input_ids

    ours, reference = pair("pre_norm", 2, 3)
    options = {**ragged([2, 5]), "max_new_tokens": 8, "suppress_tokens": [5], "custom_generate": loop}
    assert_same(generate(ours, options), generate(reference, options))


class _Interrupted(KeyboardInterrupt):
    pass


# What is interrupted, at which of its calls, and options that make so many.
INTERRUPTED = {
    "prompt": ("step", 1, {}),
    "decoding": ("step", 3, {}),
    "chunk": ("step", 2, {"prefill_chunk_size": 2}),
    "copy": ("copy", 1, {"num_beams": 2, "num_return_sequences": 2}),
}


@pytest.mark.parametrize("what", INTERRUPTED)
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_anywhere_the_next_call_is_right(what, after, monkeypatch):
    ours, reference = pair("pre_norm", 2, 6)
    options = {**ragged([5, 3]), **GREEDY, "eos_token_id": [3]}
    held = generate(ours, {**options, "return_dict_in_generate": True})
    work, at, more_options = INTERRUPTED[what]
    run = getattr(ours.runtime, work)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < at:
            return run(*arguments)
        if after:
            run(*arguments)
        raise _Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(ours.runtime, work, interrupted)
        with pytest.raises(_Interrupted):
            generate(ours, {**options, **ragged([9, 8], seed=3), **more_options})
        calls = at - 1
        if what in ("decoding", "chunk"):
            with pytest.raises(_Interrupted):
                more = torch.nn.functional.pad(held.sequences, (0, 0 if what == "decoding" else 3), value=9)
                mask = torch.nn.functional.pad(options["attention_mask"], (0, more.shape[1] - 5), value=1)
                again = {"input_ids": more, "attention_mask": mask, "past_key_values": held.past_key_values}
                generate(ours, {**options, **again})
    for extra in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2, **ragged([4])}):
        assert_same(generate(ours, {**options, **extra}), generate(reference, {**options, **extra}))
    # The cache that was being written is as it was before that call.
    theirs = generate(reference, {**options, "return_dict_in_generate": True})
    results = []
    for model, out in ((ours, held), (reference, theirs)):
        ids = torch.nn.functional.pad(out.sequences, (0, 2), value=44)
        mask = torch.nn.functional.pad(options["attention_mask"], (0, ids.shape[1] - 5), value=1)
        again = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}
        results.append(generate(model, {**options, **again}))
    assert torch.equal(*results)


def test_slots_lost_to_another_call_raise():
    ours, _ = pair("pre_norm", 1, 3)
    options = {**ragged([5, 3]), **GREEDY, "return_dict_in_generate": True}
    first = generate(ours, options)
    generate(ours, {**ragged([2, 2, 2]), **GREEDY})
    with pytest.raises(ValueError, match="lost its slots to another call.*3"):
        ours.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2)
    other, _ = pair("pre_norm", 2, 3)
    with pytest.raises(ValueError, match="another model"):
        other.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2)


def test_guidance_takes_no_slots_of_the_prompt_that_it_guides():
    ours, reference = pair("pre_norm", 1, 3)
    options = {**ragged([5]), **GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    first, theirs = generate(ours, options), generate(reference, options)
    kept = [generate(ours, {**ragged([3 + i]), **GREEDY, "return_dict_in_generate": True}) for i in range(2)]
    guided = {**GREEDY, "guidance_scale": 1.7, "eos_token_id": None}
    results = [
        generate(model, {"input_ids": out.sequences, "past_key_values": out.past_key_values, **guided})
        for model, out in ((ours, first), (reference, theirs))
    ]
    assert torch.equal(*results)
    assert len(kept) == 2


# The shipped model, and what needs a tokenizer.


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED_MODEL, padding_side="left")


@pytest.fixture(scope="module")
def reference() -> OPTForCausalLM:
    return rounded(OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)).eval()


@pytest.fixture(scope="module", params=[1, 2])
def shipped(request) -> NeuronOPTForCausalLM:
    options = {"batch_size": 4, "sequence_length": 160, "tp_degree": request.param, "kv_cache_dtype": "f32"}
    return NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, eager=True, **options)


TEXTS = ["It was a", "Mr. Darcy looked at her", "The evening was spent chiefly in talking over the ball"]
SHIPPED_MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4, "length_penalty": 0.5},
    "stop strings": {"stop_strings": [" the", "."], "max_new_tokens": 30},
    "guidance": {"guidance_scale": 1.5},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": DETAILS,
}


@pytest.mark.parametrize("mode", SHIPPED_MODES)
def test_shipped_model_equals_transformers(mode, shipped, reference, tokenizer):
    options = {**tokenizer(TEXTS, return_tensors="pt", padding=True), "max_new_tokens": 12, "tokenizer": tokenizer}
    options.update(SHIPPED_MODES[mode])
    assert_same(generate(shipped, options), generate(reference, options))


def test_shipped_model_one_prompt(shipped, reference, tokenizer):
    options = {**tokenizer(TEXTS[0], return_tensors="pt"), "max_new_tokens": 16, "do_sample": False}
    for extra in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": reference}):
        both = [generate(model, {**options, **extra}) for model in (shipped, reference)]
        assert torch.equal(*both)
    healed = {**options, "token_healing": True, "tokenizer": tokenizer, **tokenizer("It was th", return_tensors="pt")}
    assert torch.equal(generate(shipped, healed), generate(reference, healed))


def test_streamers(shipped, reference, tokenizer, capsys):
    options = {**tokenizer("It was a", return_tensors="pt"), "max_new_tokens": 12, "do_sample": False}
    expected = tokenizer.decode(reference.generate(**options)[0], skip_special_tokens=True)
    for extra in ({}, {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 1.0, "repetition_penalty": 1.0001}):
        shipped.generate(**options, **extra, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
        assert capsys.readouterr().out.strip() == expected.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=shipped.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
        thread = threading.Thread(target=shipped.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        parts = [part async for part in streamer]
        thread.join()
        return "".join(parts)

    assert asyncio.run(read()) == expected


def test_max_time_ends_a_call(shipped, tokenizer):
    start = time.monotonic()
    out = shipped.generate(**tokenizer("It", return_tensors="pt"), max_time=0.0, max_new_tokens=150, eos_token_id=None)
    assert out.shape[1] == 3 and time.monotonic() >= start


def test_generation_config_files(shipped, reference, tokenizer, tmp_path):
    GenerationConfig(
        max_new_tokens=9, num_beams=2, no_repeat_ngram_size=2, bos_token_id=2, eos_token_id=2, pad_token_id=1
    ).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    options = {**tokenizer(TEXTS, return_tensors="pt", padding=True), "generation_config": config}
    # A batch of 3 prompts of 2 beams, in two batches.
    assert_same(generate(shipped, options), generate(reference, options))
    before = shipped.generation_config, reference.generation_config
    try:
        shipped.generation_config = reference.generation_config = config
        inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
        assert_same(generate(shipped, dict(inputs)), generate(reference, dict(inputs)))
    finally:
        shipped.generation_config, reference.generation_config = before


# The end of Pride and Prejudice (1813), which the model was not trained on.
HELD_OUT = """\
Happy for all her maternal feelings was the day on which Mrs. Bennet got rid of her two most deserving daughters. \
With what delighted pride she afterwards visited Mrs. Bingley, and talked of Mrs. Darcy, may be guessed. I wish I \
could say, for the sake of her family, that the accomplishment of her earnest desire in the establishment of so many \
of her children produced so happy an effect as to make her a sensible, amiable, well-informed woman for the rest of \
her life; though perhaps it was lucky for her husband, who might not have relished domestic felicity in so unusual a \
form, that she still was occasionally nervous and invariably silly.
Mr. Bennet missed his second daughter exceedingly; his affection for her drew him oftener from home than anything \
else could do. He delighted in going to Pemberley, especially when he was least expected.
"""


@pytest.mark.parametrize("cache", [None, "f32"])
def test_perplexity_is_that_of_transformers(cache, reference, tokenizer):
    """At float16 weights; the default cache is float16 too."""
    ids = tokenizer(HELD_OUT, return_tensors="pt").input_ids
    model = NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, eager=True, kv_cache_dtype=cache)
    with torch.no_grad():
        expected = reference(ids, labels=ids).loss.exp()
    assert ids.shape[1] > 150 and expected < 300
    assert abs(model(ids, labels=ids).loss.exp() / expected - 1) < 1e-3


# Pipelines: transformers' own on our model, and ours, against transformers' on transformers' model.

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _pipelines(shipped, reference, tokenizer) -> list[transformers.Pipeline]:
    make = transformers.pipeline
    return [
        make("text-generation", model=reference, tokenizer=tokenizer),
        make("text-generation", model=shipped, tokenizer=tokenizer),
        pipeline("text-generation", shipped, tokenizer),
    ]


PIPED: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 4, "do_sample": False},
    "return_full_text": {"return_full_text": False, "do_sample": False},
    "beams": {"num_beams": 2, "num_return_sequences": 2, "batch_size": 4, "do_sample": False},
    # Drawn by transformers' loop, alike where batches are.
    "drawn beams": {"num_beams": 2, "num_return_sequences": 2, "batch_size": 2, "do_sample": True, "top_k": 10},
}


@pytest.mark.parametrize("asked", PIPED)
def test_pipelines_equal_transformers(asked, shipped, reference, tokenizer):
    results = []
    for pipe in _pipelines(shipped, reference, tokenizer):
        set_seed(0)
        results.append(pipe([*TEXTS, "Her sister"], max_new_tokens=8, **PIPED[asked]))
    assert results[1] == results[0] and results[2] == results[0]


def test_pipelines_sample_several_sequences(shipped, reference, tokenizer):
    for pipe in _pipelines(shipped, reference, tokenizer)[1:]:
        set_seed(0)
        options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 8}
        results = pipe(TEXTS, batch_size=2, return_tensors=True, **options)
        for text, result in zip(TEXTS, results, strict=True):
            assert len(result) == 2 and result[0] != result[1]
            inputs = dict(tokenizer(text, return_tensors="pt"))
            for record in result:
                new = torch.tensor([record["generated_token_ids"][-8:]])
                sequences = torch.cat([inputs["input_ids"], new], dim=1)
                single = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 1}
                assert_possible(reference, sequences, {**inputs, **single})


def test_pipelines_chat_and_stream(shipped, reference, tokenizer, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [
        [{"role": "system", "content": "Be civil."}, {"role": "user", "content": "Who is he?"}],
        [{"role": "user", "content": "Is she handsome?"}],
    ]
    results, printed = [], []
    for pipe in _pipelines(shipped, reference, tokenizer):
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        options = {"max_new_tokens": 8, "do_sample": False}
        results.append([pipe(chats, batch_size=2, **options), pipe(chats[1], streamer=streamer, **options)])
        printed.append(capsys.readouterr().out)
    assert results[0][0][0][0]["generated_text"][-1]["role"] == "assistant"
    assert results[1] == results[0] and results[2] == results[0]
    assert printed[1] == printed[0] and printed[2] == printed[0] and printed[0].strip()
