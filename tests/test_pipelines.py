"""`optimum_opt_trn.pipeline` on the shipped model, against transformers' own pipeline on the same weights."""

import copy
import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from requirements import needs_optimum_neuron
from small_models import SHIPPED_MODEL, rounded, tiny_opt
from transformers import AutoTokenizer, OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, pipeline


PROMPTS = [
    "It was",
    "Elizabeth looked at her sister, and was silent; but she could not help thinking that",
    "Mr. Darcy",
    "The evening was spent chiefly in talking over",
]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "out"
    config = OPTNeuronConfig(batch_size=3, sequence_length=40, kv_cache_dtype="f32")
    NeuronOPTForCausalLM.export(SHIPPED_MODEL, config, eager=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def expected(tokenizer) -> list[str]:
    reference = rounded(OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32))
    alone = transformers.pipeline("text-generation", model=reference, tokenizer=tokenizer)
    return [text(result) for result in alone(PROMPTS, max_new_tokens=10, do_sample=False)]


def text(result) -> str:
    (record,) = result
    return record["generated_text"]


@needs_optimum_neuron
def test_the_signature_is_optimum_neurons():
    """Read, not imported: that module needs the SDK."""
    import ast

    import optimum.neuron

    source = Path(optimum.neuron.__file__).parent / "pipelines" / "transformers" / "base.py"
    (theirs,) = [
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "pipeline"
    ]
    ours = inspect.signature(pipeline)
    assert [*(a.arg for a in theirs.args.args), theirs.args.kwarg.arg] == list(ours.parameters)


def test_from_a_directory_every_prompt_is_as_if_it_were_the_only_one(export, expected):
    pipe = pipeline("text-generation", export)
    assert pipe._batch_size == 24
    assert [text(result) for result in pipe(PROMPTS, max_new_tokens=10, do_sample=False)] == expected
    assert [text(pipe(p, max_new_tokens=10, do_sample=False)) for p in PROMPTS] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_from_a_model_with_either_padding(export, expected, tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    model = NeuronOPTForCausalLM.from_pretrained(export)
    ours = pipeline(model=model, tokenizer=tokenizer, batch_size=2)
    assert [text(r) for r in ours(PROMPTS, max_new_tokens=10, do_sample=False)] == expected
    assert tokenizer.padding_side == side, "the caller's tokenizer stays as it is"
    theirs = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    assert [text(r) for r in theirs(PROMPTS, max_new_tokens=10, do_sample=False)] == expected


def test_the_tokenizer_of_the_model_is_used(export, expected):
    pipe = pipeline(model=NeuronOPTForCausalLM.from_pretrained(export))
    assert text(pipe(PROMPTS[1], max_new_tokens=10, do_sample=False)) == expected[1]


def test_without_a_pad_token(export, expected, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    pipe = pipeline(model=export, tokenizer=tokenizer)
    assert tokenizer.pad_token is None and pipe.tokenizer.pad_token == "<pad>"
    assert [text(result) for result in pipe(PROMPTS, max_new_tokens=10, do_sample=False)] == expected


def test_export_first(expected):
    pipe = pipeline(
        model=SHIPPED_MODEL, export=True, eager=True, batch_size=2, sequence_length=32, tensor_parallel_size=2,
        amp="f16", kv_cache_dtype="f32", max_new_tokens=10, do_sample=False,
    )  # fmt: skip
    made = pipe.model.neuron_config
    assert (made.batch_size, made.sequence_length, made.tp_degree, made.kv_cache_dtype) == (2, 32, 2, "f32")
    assert [text(result) for result in pipe(PROMPTS)] == expected


def test_without_a_length_it_ends_where_the_export_does(export, tokenizer):
    pipe = pipeline(model=export, do_sample=False, return_full_text=False, eos_token_id=None)
    for batch in (PROMPTS[:1], PROMPTS[:3]):
        results = pipe(batch, return_tensors=True)
        longest = max(len(tokenizer(p).input_ids) for p in batch)
        new = [len(record["generated_token_ids"]) - longest for (record,) in results]
        assert new == [40 - longest] * len(batch)


@pytest.mark.skipif(
    transformers.__version__.startswith("5."),
    reason="transformers 5 passes its default length as if the user had asked for it",
)
def test_transformers_own_pipeline_ends_there_too(export, tokenizer):
    model = NeuronOPTForCausalLM.from_pretrained(export)
    options = {"model": model, "tokenizer": tokenizer, "do_sample": False, "return_full_text": False}
    pipe = transformers.pipeline("text-generation", eos_token_id=None, **options)
    (record,) = pipe(PROMPTS[1], return_tensors=True)
    assert len(record["generated_token_ids"]) == 40
    (record,) = pipe(PROMPTS[1], return_tensors=True, max_new_tokens=3)
    assert len(record["generated_token_ids"]) == len(tokenizer(PROMPTS[1]).input_ids) + 3
    for asked in ({"max_new_tokens": 100}, {"max_length": 100}):
        with pytest.raises(ValueError, match="sequence_length=40"):
            pipe(PROMPTS[0], **asked)
        with pytest.raises(ValueError, match="sequence_length=40"):
            transformers.pipeline("text-generation", **options, **asked)(PROMPTS[0])


@pytest.mark.parametrize("theirs", [False, True])
def test_long_prompts_are_cut_where_that_was_asked_for(export, theirs):
    """`handle_long_generation="hole"` reads the tokenizer's model_max_length: that of an export is the export's."""
    make = transformers.pipeline if theirs else pipeline
    model, tokenizer = NeuronOPTForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert tokenizer.model_max_length == 40
    pipe = make("text-generation", model=model, tokenizer=tokenizer, return_full_text=False)
    asked = {"max_new_tokens": 8, "do_sample": False}
    words = " ".join(["She was very happy and"] * 12)
    kept = tokenizer(words).input_ids[-32:]
    expected = model.generate(torch.tensor([kept]), **asked)[0, 32:]
    cut = pipe(words, handle_long_generation="hole", **asked)
    assert text(cut) == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("given", [{"max_new_tokens": 100}, {"max_length": 100}])
def test_a_length_that_was_asked_for_is_not_cut(export, given):
    with pytest.raises(ValueError, match="sequence_length=40"):
        pipeline(model=export)(PROMPTS[0], **given)
    with pytest.raises(ValueError, match="sequence_length=40"):
        pipeline(model=export, **given)(PROMPTS[0])


def test_no_warning_about_padding(export, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(model=export)(PROMPTS[:3], max_new_tokens=2)
    assert "padding" not in caplog.text


ERRORS = {
    "task": ({"task": "fill-mask", "model": "x"}, ValueError, "fill-mask.*text-generation"),
    "no model": ({"task": "text-generation"}, ValueError, "needs a model"),
    "feature extractor": ({"model": "x", "feature_extractor": "y"}, ValueError, "feature_extractor"),
    "image processor": ({"model": "x", "image_processor": "y"}, ValueError, "image_processor"),
    "shapes": ({"model": "x", "input_shapes": {"batch_size": 2}}, ValueError, "input_shapes.*by name"),
    "compiler": ({"model": "x", "compiler_args": {"auto_cast": "all"}}, ValueError, "compiler_args"),
    "typo": ({"model": "x", "max_new_token": 5}, TypeError, "max_new_tokens"),
    "typo in an export option": ({"model": "x", "export": True, "sequence_lenght": 5}, TypeError, "sequence_length"),
    "not exported": ({"model": SHIPPED_MODEL}, ValueError, "export=True"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS.values(), ids=list(ERRORS))
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        pipeline(**arguments)


def test_errors_about_an_export(export, tmp_path):
    with pytest.raises(ValueError, match="already"):
        pipeline(model=export, export=True)
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        pipeline(model=export, batch_size=0)
    with pytest.raises(ValueError, match="sequence_length=40.*128"):
        pipeline(model=export, sequence_length=128)
    with pytest.raises(OSError):
        pipeline(model=tmp_path / "nothing-here")
    model = NeuronOPTForCausalLM.from_pretrained(export)
    with pytest.raises(ValueError, match="loaded already"):
        pipeline(model=model, export=True)


def test_no_tokenizer_anywhere(tmp_path):
    tiny_opt().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer="):
        pipeline(model=tmp_path, export=True, eager=True)


def test_a_saved_pipeline_is_an_export(export, expected, tmp_path):
    pipeline(model=export).save_pretrained(tmp_path / "saved")
    assert text(pipeline(model=tmp_path / "saved")(PROMPTS[0], max_new_tokens=10, do_sample=False)) == expected[0]
