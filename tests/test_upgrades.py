"""Exports of every form that ever was load, and give the tokens that they gave (tests/data/exports/README.md)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.checkpoint.verify import find_problems, find_unlisted
from optimum_opt_trn.export import export_opt


EXPORTS = sorted(path for path in (Path(__file__).parent / "data" / "exports").iterdir() if path.is_dir())
PROMPT = torch.tensor([[2, 5, 7]])
# What each gave when it was made, and transformers on its checkpoint.
TOKENS = [[2, 5, 7, 5, 5, 5, 29, 5, 29, 5, 29]]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
every_export = pytest.mark.parametrize("export", EXPORTS, ids=[path.name for path in EXPORTS])


def test_all_are_there():
    assert [path.name.partition("-")[0] for path in EXPORTS] == ["1", "2", "3", "4", "5", "6"]


@every_export
def test_it_loads(export):
    for eager in (False, True):
        assert NeuronOPTForCausalLM.from_pretrained(export, eager=eager).generate(PROMPT, **GREEDY).tolist() == TOKENS
    reference = OPTForCausalLM.from_pretrained(export / "checkpoint", dtype=torch.float32)
    assert reference.generate(PROMPT, **GREEDY).tolist() == TOKENS


@every_export
def test_it_is_a_source_and_its_successor_is_verified(export, tmp_path):
    source = Path(shutil.copytree(export, tmp_path / "source"))
    again = export_opt(source, tmp_path / "again", OPTNeuronConfig(sequence_length=16, tp_degree=2))
    assert NeuronOPTForCausalLM.from_pretrained(again).generate(PROMPT, **GREEDY).tolist() == TOKENS
    assert find_problems(again) == find_unlisted(again) == []


def test_an_int8_export_with_a_head_in_float16_keeps_it(tmp_path):
    """Neither loading it nor exporting it again changes its head, which is the embedding."""
    export = EXPORTS[5]
    model = NeuronOPTForCausalLM.from_pretrained(export / "checkpoint")
    model.save_pretrained(tmp_path)
    assert model.neuron_config.weight_dtype == "int8" and model.config.tie_word_embeddings
    assert "lm_head" in model.config.quantization_config["ignore"]
    for file in (export / "checkpoint").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "checkpoint" / file.name).read_bytes()
    whole = NeuronOPTForCausalLM.from_pretrained(export / "checkpoint", weight_dtype="f16")
    for loaded in (model, whole, NeuronOPTForCausalLM.from_pretrained(tmp_path)):
        assert loaded.generate(PROMPT, **GREEDY).tolist() == TOKENS


@every_export
def test_verification_says_what_it_can_tell(export):
    number = int(export.name[0])
    problems, unlisted = find_problems(export), find_unlisted(export)
    if number == 1:
        assert len(problems) == 1 and "split_manifest.json is missing" in problems[0] and "again" in problems[0]
    elif number < 5:
        assert problems == [] and {"config.json", "neuron_config.json", "compiled/manifest.json"} <= set(unlisted)
    else:
        assert problems == unlisted == []


@every_export
def test_a_later_format_says_how_to_go_on(export, tmp_path):
    later = Path(shutil.copytree(export, tmp_path / "later"))
    options = json.loads((later / "neuron_config.json").read_text())
    (later / "neuron_config.json").write_text(json.dumps({**options, "format_version": 99}))
    with pytest.raises(ValueError, match="format 99.*upgrade optimum_opt_trn, or export the model again"):
        NeuronOPTForCausalLM.from_pretrained(later)
