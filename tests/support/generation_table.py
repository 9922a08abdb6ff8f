"""The tables in docs/generation.md: every option of GenerationConfig, run against transformers; what is refused.

python tests/support/generation_table.py          # prints them
python tests/support/generation_table.py --write  # puts them into docs/generation.md

The table of options has a column for each version of transformers. Only the installed one is run; what the page says
of the others stays.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from against_transformers import assert_possible, assert_same, assert_same_inside, generate, pair, ragged
from small_models import SHIPPED_MODEL, rounded, tiny_opt
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, OPTForCausalLM, PreTrainedTokenizerBase
from transformers.generation import CompileConfig, WatermarkingConfig

from optimum_opt_trn import NeuronOPTForCausalLM
from optimum_opt_trn.generation.refusals import REFUSED_ARGUMENTS, REFUSED_OPTIONS


# The versions that the table has, and the one that is run.
VERSIONS = ("4.57", "5.24")
VERSION = ".".join(transformers.__version__.split(".")[:2])

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
BEGIN, END = "<!-- {} of tests/support/generation_table.py -->\n", "<!-- end -->\n"

ENDS = [7, 20, 33, 46, 59, 72, 85, 98]
DETAILS = {"return_dict_in_generate": True, "output_scores": True}
BEAMS = {"num_beams": 3}
SAMPLE = {"do_sample": True}
# Words of the shipped model's tokenizer; it needs `text` and gets the tokenizer.
TEXT = {"text": "It was th"}
ASSISTED = {"assistant": True}
OTHER_WORDS = {**TEXT, **ASSISTED, "other_words": True}

# What each option is run with, on three prompts of different lengths, padded at the left (one, where transformers
# takes but one). The value that is asked for differs from the default.
ASKED: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 12, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 15},
    "min_new_tokens": {"min_new_tokens": 9},
    "early_stopping": {"early_stopping": True, **BEAMS},
    "max_time": {"max_time": 600.0},
    "stop_strings": {"stop_strings": ["e"], **TEXT},
    "do_sample": SAMPLE,
    "num_beams": BEAMS,
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"max_cache_len": 30}},
    "max_cache_len": {"max_cache_len": 30},
    "return_legacy_cache": {"return_legacy_cache": True},
    "prefill_chunk_size": {"prefill_chunk_size": 2, "prompts": [6]},
    "temperature": {"temperature": 0.5, **SAMPLE},
    "top_k": {"top_k": 4, **SAMPLE},
    "top_p": {"top_p": 0.6, **SAMPLE},
    "min_p": {"min_p": 0.2, **SAMPLE},
    "top_h": {"top_h": 0.4, **SAMPLE},
    "typical_p": {"typical_p": 0.4, **SAMPLE},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03, **SAMPLE},
    "eta_cutoff": {"eta_cutoff": 0.05, **SAMPLE},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.6},
    "length_penalty": {"length_penalty": -2.0, **BEAMS},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[74], [113], [46, 37]]},
    "renormalize_logits": {"renormalize_logits": True, **DETAILS},
    "forced_bos_token_id": {"forced_bos_token_id": 44, "prompts": [1]},
    "forced_eos_token_id": {"forced_eos_token_id": 44},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6)},
    "suppress_tokens": {"suppress_tokens": [74, 91, 113]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [46, 92, 74]},
    "sequence_bias": {"sequence_bias": {(74,): -6.0, (91, 74): 4.0}},
    "token_healing": {"token_healing": True, **TEXT},
    "guidance_scale": {"guidance_scale": 1.8},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "num_return_sequences": {"num_return_sequences": 2, **BEAMS},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": DETAILS,
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 5},
    "bos_token_id": {"bos_token_id": 9, "prompts": []},
    "eos_token_id": {"eos_token_id": [30, 40, 50, 60]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 9},
    "is_assistant": {"is_assistant": True, "assistant_confidence_threshold": 0.3, "prompts": [6], **DETAILS},
    "num_assistant_tokens": {"num_assistant_tokens": 3, **ASSISTED},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic", **ASSISTED},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.1, **ASSISTED},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3, "prompts": [9]},
    "max_matching_ngram_size": {"max_matching_ngram_size": 1, "prompt_lookup_num_tokens": 3, "prompts": [9]},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_lookbehind": {"assistant_lookbehind": 4, **OTHER_WORDS},
    "target_lookbehind": {"target_lookbehind": 4, **OTHER_WORDS},
    # The tokens depend on how many are drafted at once.
    "assistant_ensemble_weight": {
        "assistant_ensemble_weight": 0.5,
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": "constant",
        **ASSISTED,
    },
    "speculation_type": {"speculation_type": "dflash", **ASSISTED},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "low_memory": {"low_memory": True},
    "continuous_batching_config": {"continuous_batching_config": {"block_size": 8}},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "diversity_penalty": {"diversity_penalty": 0.5, "num_beams": 2, "num_beam_groups": 2},
    "num_beam_groups": {"diversity_penalty": 0.5, "num_beams": 2, "num_beam_groups": 2},
    "constraints": {"constraints": ["anything"], **BEAMS},
    "force_words_ids": {"force_words_ids": [[5]], **BEAMS},
}


# Not an option of this version.
ABSENT = "—"


def options() -> list[str]:
    """Every option, in the order of GenerationConfig."""
    return [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]


@functools.cache
def _shipped() -> tuple[NeuronOPTForCausalLM, OPTForCausalLM, PreTrainedTokenizerBase]:
    ours = NeuronOPTForCausalLM.from_pretrained(
        SHIPPED_MODEL, eager=True, batch_size=9, sequence_length=64, kv_cache_dtype="f32"
    )
    reference = rounded(OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32))
    return ours, reference, AutoTokenizer.from_pretrained(SHIPPED_MODEL, padding_side="left")


def compare(name: str) -> str:
    """`same` or `refused`; AssertionError, or whatever else was raised, for anything else."""
    if name not in options():
        return ABSENT
    asked = dict(ASKED[name])
    ours, reference = pair("pre_norm", 1, 9)
    call: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": ENDS, "pad_token_id": 1}
    assisted, other_words = asked.pop("assistant", False), asked.pop("other_words", False)
    assistant = pair("untied", 1, 9)[1]
    if "text" in asked:
        ours, reference, tokenizer = _shipped()
        call = {**tokenizer(asked.pop("text"), return_tensors="pt"), "max_new_tokens": 10, "tokenizer": tokenizer}
        assistant = reference
        if other_words:  # another vocabulary, as far as transformers can see
            assistant = rounded(tiny_opt(vocab_size=tokenizer.vocab_size + 1))
            call["assistant_tokenizer"] = copy.deepcopy(tokenizer)
    else:
        prompts = asked.pop("prompts", [5] if assisted else [4, 1, 7])
        call.update(ragged(prompts) if prompts else {})
    if assisted:
        call["assistant_model"] = assistant
        # transformers' assistants take these options from their own configuration.
        assistant.generation_config.update(**{n: v for n, v in asked.items() if "assistant" in n})
    call.update(asked)
    try:
        mine = generate(ours, call)
    except NotImplementedError as error:
        assert name in REFUSED_OPTIONS and REFUSED_OPTIONS[name] in str(error), error
        return "refused"
    assert name not in REFUSED_OPTIONS, f"{name} is in REFUSED_OPTIONS, and works"
    if asked.get("do_sample"):
        for seed in range(3):
            drawn = generate(ours, call, seed)
            assert_possible(reference, drawn if isinstance(drawn, Tensor) else drawn.sequences, call)
    else:
        if asked.get("output_attentions"):  # which its other attentions do not return
            reference = copy.deepcopy(reference)
            reference.set_attn_implementation("eager")
        theirs = generate(reference, call)
        assert_same(mine, theirs)
        if not isinstance(mine, Tensor):
            assert_same_inside(mine, theirs, call.get("attention_mask"))
    return "same"


def table() -> str:
    """The table, in Markdown."""
    rows = committed("table").splitlines()[2:]
    before = dict(row.strip("| ").split(" | ", 1) for row in rows)
    lines = [f"| option | {' | '.join(VERSIONS)} |", f"|---|{'---|' * len(VERSIONS)}"]
    for name in ASKED:
        results = dict(zip(VERSIONS, before.get(f"`{name}`", "").split(" | "), strict=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[VERSION] = compare(name)
        lines.append(f"| `{name}` | {' | '.join(results.get(version) or ABSENT for version in VERSIONS)} |")
    return "\n".join(lines) + "\n"


def refusals() -> str:
    """What is refused and why, in Markdown."""
    lines = ["| option or argument | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in {**REFUSED_OPTIONS, **REFUSED_ARGUMENTS}.items()]
    return "\n".join(lines) + "\n"


MADE: dict[str, Callable[[], str]] = {"table": table, "refusals": refusals}


def committed(name: str) -> str:
    """What stands in the page."""
    return PAGE.read_text().split(BEGIN.format(name))[1].split(END)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/generation.md")
    write = parser.parse_args().write
    for name, make in MADE.items():
        made = make()
        if write:
            before, after = PAGE.read_text().split(BEGIN.format(name))
            PAGE.write_text(before + BEGIN.format(name) + made + END + after.split(END, 1)[1])
        else:
            sys.stdout.write(made)


if __name__ == "__main__":
    main()
