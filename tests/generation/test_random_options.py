"""Random combinations of generate()'s options: none gives other results than transformers without saying so."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from against_transformers import assert_possible, assert_same, generate, pair, ragged
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import WatermarkingConfig

from optimum_opt_trn.generation.refusals import REFUSED_OPTIONS


EXAMPLES = int(os.environ.get("OPT_TRN_EXAMPLES", "40"))
VOCABULARY = 128


class Shift(LogitsProcessor):
    """A caller's own processor."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 0.5 * torch.cos(input_ids[:, -1:] + torch.arange(scores.shape[1]))


class StopAt(StoppingCriteria):
    """A caller's own criterion: a row ends with its first odd multiple of 7."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return input_ids[:, -1] % 14 == 7


def tokens(least: int = 1, most: int = 4) -> st.SearchStrategy:
    return st.lists(st.integers(4, VOCABULARY - 1), min_size=least, max_size=most, unique=True)


# Each option's interesting values; a draw takes a few of them.
PROCESSED = {
    "repetition_penalty": st.floats(0.5, 2.0),
    "encoder_repetition_penalty": st.floats(0.5, 2.0),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(tokens(), min_size=1, max_size=3),
    "sequence_bias": st.dictionaries(tokens(1, 2).map(tuple), st.floats(-5, 5), min_size=1, max_size=3),
    "min_length": st.integers(0, 20),
    "min_new_tokens": st.integers(0, 12),
    "forced_bos_token_id": st.integers(4, VOCABULARY - 1),
    "forced_eos_token_id": st.integers(4, VOCABULARY - 1),
    "remove_invalid_values": st.just(True),
    "suppress_tokens": tokens(),
    "begin_suppress_tokens": tokens(),
    "renormalize_logits": st.just(True),
    "guidance_scale": st.floats(0.5, 3.0),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1.1, 3.0)),
    "watermarking_config": st.builds(WatermarkingConfig, greenlist_ratio=st.floats(0.2, 0.6)),
    "logits_processor": st.just(LogitsProcessorList([Shift()])),
    "stopping_criteria": st.just(StoppingCriteriaList([StopAt()])),
    "prefix_allowed_tokens_fn": st.sampled_from([2, 3]).map(
        lambda step: lambda batch, row: list(range(4 + (batch + int(row[-1])) % step, VOCABULARY, step))
    ),
    "use_cache": st.just(False),
    "prefill_chunk_size": st.integers(1, 5),
    "num_return_sequences": st.integers(1, 3),
    "disable_compile": st.just(True),
    "max_time": st.just(600.0),
    "token_healing": st.just(False),
    "low_memory": st.booleans(),
}
WARPED = {
    "temperature": st.floats(0.2, 2.0),
    "top_k": st.sampled_from([0, 1, 2, 20, 50, 127, 128, 300]),
    "top_p": st.floats(0.05, 1.0),
    "min_p": st.floats(0.0, 0.5),
    "typical_p": st.floats(0.1, 1.0),
    "epsilon_cutoff": st.floats(0.0, 0.1),
    "eta_cutoff": st.floats(0.0, 0.1),
}
RETURNED = {
    "return_dict_in_generate": st.just(True),
    "output_scores": st.booleans(),
    "output_logits": st.booleans(),
}
BEAMS = {"early_stopping": st.sampled_from([True, False, "never"]), "length_penalty": st.floats(-1.0, 2.0)}


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """A call of generate(): prompts, options, and the shape of the export."""
    mode = draw(st.sampled_from(["greedy", "sample", "beams", "beam_sample", "lookup", "assisted"]))
    prompts = 1 if mode in ("lookup", "assisted") else draw(st.integers(1, 3))
    options: dict = ragged(draw(st.lists(st.integers(1, 9), min_size=prompts, max_size=prompts)), VOCABULARY)
    options["max_new_tokens"] = draw(st.integers(1, 9))
    options["pad_token_id"] = 1
    options["eos_token_id"] = draw(st.none() | tokens(1, 12))
    options["do_sample"] = mode in ("sample", "beam_sample")
    for name in draw(st.lists(st.sampled_from([*PROCESSED]), max_size=3, unique=True)):
        options[name] = draw(PROCESSED[name])
    if options["eos_token_id"] is None and mode in ("greedy", "sample"):
        # Then transformers writes on rows that ended while others of the batch have not; each batch is a batch.
        options.pop("stopping_criteria", None)
    if options["do_sample"]:
        for name in draw(st.lists(st.sampled_from([*WARPED]), max_size=3, unique=True)):
            options[name] = draw(WARPED[name])
    if draw(st.booleans()):
        options.update({name: draw(values) for name, values in RETURNED.items()})
    if mode in ("beams", "beam_sample"):
        options["num_beams"] = draw(st.integers(2, 3))
        options.update({name: draw(values) for name, values in BEAMS.items() if draw(st.booleans())})
    if mode == "lookup":
        options["prompt_lookup_num_tokens"] = draw(st.integers(1, 4))
    if mode == "assisted":
        options["assistant_model"] = pair("untied", 1, 2, 64)[draw(st.integers(0, 1))]
        options.pop("prefill_chunk_size", None)  # which transformers' own assistants fail on
    if prompts > 1 and max(options.get("num_beams", 1), options.get("num_return_sequences", 1)) > 1:
        # transformers takes row i's penalties from prompt i, whosever sequence row i is; ours does in a batch.
        options.pop("encoder_repetition_penalty", None)
    if "guidance_scale" in options and draw(st.booleans()):
        negative = ragged(draw(st.lists(st.integers(1, 5), min_size=prompts, max_size=prompts)), VOCABULARY, seed=1)
        options["negative_prompt_ids"] = negative["input_ids"]
        options["negative_prompt_attention_mask"] = negative["attention_mask"]
    options["export"] = draw(st.sampled_from([(1, 9), (1, 3), (2, 6)]))
    return options


def _rows(call: dict, prompts: int | None = None) -> int:
    each = call.get("num_beams", 1) * (2 if call.get("guidance_scale", 1) != 1 else 1)
    return each * (len(call["input_ids"]) if prompts is None else prompts)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    report_multiple_bugs=False,
    derandomize="OPT_TRN_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(calls())
def test_no_combination_is_silently_different(call):
    tp_degree, batch_size = call.pop("export")
    ours, reference = pair("pre_norm", tp_degree, batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Chunks must not change results; transformers' own count padding, and fail on a prompt of one token.
            theirs = generate(reference, {name: call[name] for name in call if name != "prefill_chunk_size"})
        except Exception as error:  # whatever it is, it is transformers' answer
            theirs = error
        try:
            mine = generate(ours, call)
        except (NotImplementedError, ValueError) as error:
            if isinstance(theirs, Exception):
                event(f"both raise {str(theirs)[:100]}")
                return
            event("only ours raises")
            assert _rows(call, prompts=1) > batch_size or any(name in str(error) for name in REFUSED_OPTIONS), (
                f"only ours: {error}"
            )
            return
        except Exception as error:
            if isinstance(theirs, Exception) and type(theirs) is type(error):
                event(f"both raise {str(theirs)[:100]}")
                return
            raise
        if isinstance(theirs, Exception):
            pytest.fail(f"only theirs: {theirs!r}")
        if call["do_sample"] and call.get("num_beams", 1) == 1:
            sequences = mine if isinstance(mine, Tensor) else mine.sequences
            event("sampled")
            assert_possible(reference, sequences, call)
        elif call["do_sample"] and _rows(call) > batch_size:
            # Beams of several batches are drawn in another order.
            assert len(mine if isinstance(mine, Tensor) else mine.sequences) == len(
                theirs if isinstance(theirs, Tensor) else theirs.sequences
            )
        else:
            event("same")
            assert_same(mine, theirs, batches=_rows(call) > batch_size)
