"""BLIP-2: transformers' own model, with an export as its language model."""

from __future__ import annotations

import functools
import json
import tempfile

import pytest
import torch
from against_transformers import TOLERANCE
from small_blip2 import prompts, tiny_blip2
from small_models import rounded, tiny_opt
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM, save_pretrained_split


KINDS = {"pre_norm": {}, "post_norm": {"do_layer_norm_before": False}}


@functools.cache
def pair(kind: str, tp_degree: int) -> tuple[Blip2ForConditionalGeneration, Blip2ForConditionalGeneration]:
    """A BLIP-2 with our export of its OPT, and transformers' own on the same rounded weights."""
    ours, theirs = tiny_blip2(**KINDS[kind]), tiny_blip2(**KINDS[kind])
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        opt = NeuronOPTForCausalLM.from_pretrained(
            directory, eager=True, batch_size=3, sequence_length=48, kv_cache_dtype="f32", tp_degree=tp_degree
        )
    ours.language_model = opt.as_module()
    theirs.language_model = rounded(theirs.language_model)
    return ours, theirs


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_as_transformers(kind, tp_degree, count, beams):
    ours, theirs = pair(kind, tp_degree)
    inputs = prompts(count)
    options = {"max_new_tokens": 8, "num_beams": beams, "pad_token_id": 1}
    for more in ({}, {"no_repeat_ngram_size": 1}):  # left to itself, a random model repeats a token
        generated = ours.generate(**inputs, **options, **more)
        assert torch.equal(generated, theirs.generate(**inputs, **options, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_describes_an_image_without_a_prompt(kind):
    ours, theirs = pair(kind, 1)
    pixels = prompts(2)["pixel_values"]
    options = {"max_new_tokens": 5, "pad_token_id": 1}
    assert torch.equal(ours.generate(pixels, **options), theirs.generate(pixels, **options))


def test_forward_gives_logits_and_loss():
    ours, theirs = pair("pre_norm", 2)
    inputs = prompts(2)
    counted = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].where(counted & counted.roll(1, dims=1), -100)  # nothing predicts a first token
    with torch.no_grad():
        mine, reference = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    torch.testing.assert_close(mine.logits[counted], reference.logits[counted], atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(mine.loss, reference.loss, atol=TOLERANCE, rtol=1e-4)


def test_loads_without_its_own_opt(tmp_path):
    """What docs/beyond_text.md says: a BLIP-2 whose OPT has no layers takes ours."""
    tiny_blip2().save_pretrained(tmp_path)
    config = Blip2Config.from_pretrained(tmp_path)
    config.text_config.num_hidden_layers = 0
    blip2 = Blip2ForConditionalGeneration.from_pretrained(tmp_path, config=config)
    blip2.language_model = pair("pre_norm", 1)[0].language_model
    inputs, options = prompts(1), {"max_new_tokens": 5, "pad_token_id": 1}
    assert torch.equal(blip2.generate(**inputs, **options), pair("pre_norm", 1)[1].generate(**inputs, **options))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_split_checkpoint_is_that_of_the_opt(tmp_path, sharded):
    opt = tiny_opt()
    blip2 = tiny_blip2()
    blip2.save_pretrained(tmp_path / "blip2", max_shard_size="100KB" if sharded else "1GB")
    assert (tmp_path / "blip2" / "model.safetensors.index.json").exists() == sharded
    opt.save_pretrained(tmp_path / "opt")
    for source in ("blip2", "opt"):
        save_pretrained_split(tmp_path / source, tmp_path / f"{source}-split")
    save_pretrained_split(blip2, tmp_path / "loaded-split")
    for name in ("embeddings_and_head.safetensors", "layer_000.safetensors", "layer_001.safetensors"):
        expected = (tmp_path / "opt-split" / name).read_bytes()
        assert (tmp_path / "blip2-split" / name).read_bytes() == expected
        assert (tmp_path / "loaded-split" / name).read_bytes() == expected
    reloaded = OPTForCausalLM.from_pretrained(tmp_path / "blip2-split", dtype=torch.float32)
    for name, tensor in rounded(opt).state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


def test_takes_generation_options_from_the_text_config(tmp_path):
    """transformers gives the language model these, and none of generation_config.json, which is the BLIP-2's."""
    blip2 = tiny_blip2(eos_token_id=9)
    blip2.generation_config.eos_token_id = 5
    blip2.save_pretrained(tmp_path)
    opt = NeuronOPTForCausalLM.from_pretrained(tmp_path, eager=True, sequence_length=48)
    assert opt.generation_config.eos_token_id == 9
    assert opt.config.model_type == "opt"


def test_refuses_another_language_model(tmp_path):
    tiny_blip2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "t5"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of model_type 'blip-2', and optimum_opt_trn serves only 'opt'"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path)


def test_names_a_missing_tensor(tmp_path):
    blip2 = tiny_blip2()
    state = {k: v for k, v in blip2.state_dict().items() if "layers.1.fc1.weight" not in k}
    blip2.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.decoder\.layers\.1\.fc1\.weight"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path, eager=True, sequence_length=48)
