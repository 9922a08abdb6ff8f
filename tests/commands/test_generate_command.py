"""`optimum-cli neuron generate`, as installed, against transformers' own text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimum.commands import optimum_cli
from small_models import SHIPPED_MODEL, rounded, tiny_opt
from transformers import AutoTokenizer, OPTForCausalLM, set_seed

from optimum_opt_trn import NeuronOPTForCausalLM


PROMPT = "It was a fine"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "out"
    options = {"batch_size": 3, "sequence_length": 48, "kv_cache_dtype": "f32", "eager": True}
    NeuronOPTForCausalLM.from_pretrained(SHIPPED_MODEL, **options).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def reference() -> OPTForCausalLM:
    return rounded(OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32))


@pytest.fixture
def cli(monkeypatch):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "neuron", "generate", *map(str, arguments)])
        optimum_cli.main()

    return run


def continued(reference, tokenizer, prompt=PROMPT, **asked) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = reference.generate(**inputs, **{"do_sample": False, **asked})
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_help_teaches(cli, capsys):
    with pytest.raises(SystemExit) as ended:
        cli("--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for words in ("examples:", "--interactive", "--max_new_tokens", "GenerationConfig", "stdin"):
        assert words in out


FLAGS = {
    "greedy": ((), {}),
    "a declared flag": (("--num_beams", "3"), {"num_beams": 3}),
    "any option": (("--repetition_penalty", "1.7"), {"repetition_penalty": 1.7}),
    "with an equals sign": (("--no_repeat_ngram_size=2",), {"no_repeat_ngram_size": 2}),
    "a list": (("--suppress_tokens", "[300, 301, 302]"), {"suppress_tokens": [300, 301, 302]}),
    "by its name and value": (("--option", "repetition_penalty=1.7"), {"repetition_penalty": 1.7}),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("first", [True, False])
def test_writes_what_transformers_writes(flags, first, cli, export, reference, tokenizer, capsys):
    """With flags in front of the prompt and behind it; only the text is on stdout."""
    given, asked = FLAGS[flags]
    given = ("--max_new_tokens", "12", *given)
    cli(*((export, *given, PROMPT) if first else (export, PROMPT, *given)))
    assert capsys.readouterr().out == continued(reference, tokenizer, max_new_tokens=12, **asked)


def test_without_a_length_it_fills_the_export(cli, export, reference, tokenizer, capsys):
    cli(export, PROMPT, "--eos_token_id", "null")
    asked = {"eos_token_id": None, "max_length": 48}
    assert capsys.readouterr().out == continued(reference, tokenizer, **asked)


def test_a_seed_gives_the_same_text_again(cli, export, tokenizer, capsys):
    arguments = (export, PROMPT, "--do_sample", "--top_k", "40", "--max_new_tokens", "12", "--seed")
    texts = []
    for seed in (3, 3, 4):
        cli(*arguments, seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    model = NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    set_seed(3)
    asked = {"do_sample": True, "top_k": 40, "max_new_tokens": 12}
    assert texts[0] == continued(model, tokenizer, **asked)


def test_prompts_from_stdin(cli, export, reference, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    cli(export, "--max_new_tokens", "8")
    assert capsys.readouterr().out == continued(reference, tokenizer, max_new_tokens=8)


def test_interactive(cli, export, reference, tokenizer, capsys, monkeypatch):
    """Each prompt for itself; one that is too long is told, and the next is served."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n{'word ' * 60}\nMr. Darcy\nexit\nnever\n"))
    cli(export, "--interactive", "--max_new_tokens", "8")
    shown = capsys.readouterr()
    asked = {"max_new_tokens": 8}
    expected = [continued(reference, tokenizer, prompt, **asked) for prompt in (PROMPT, "Mr. Darcy")]
    assert shown.out == "".join(expected)
    assert "error:" in shown.err and "sequence_length=48" in shown.err


def test_a_checkpoint_is_exported_first(cli, reference, tokenizer, capsys):
    flags = ("--sequence_length", "32", "--max_new_tokens", "8", "--num_beams", "2", "--eager")
    cli(SHIPPED_MODEL, PROMPT, *flags, "--tensor_parallel_size", "2", "--auto_cast_type", "fp32")
    source = OPTForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    assert capsys.readouterr().out == continued(source, tokenizer, max_new_tokens=8, num_beams=2)


ERRORS = {
    "no model": (("no-such-model", "It"), "no-such-model is not a local directory"),
    "a typo": (("EXPORT", "It", "--temprature", "2"), "--temprature, did you mean --temperature?"),
    "a typo of any option": (("EXPORT", "It", "--repetition_penalti=2"), "did you mean --repetition_penalty?"),
    "a typo of a name": (("EXPORT", "It", "--option", "temprature=2"), "did you mean 'temperature'"),
    "no value": (("EXPORT", "It", "--option", "temperature"), "'temperature' is not NAME=VALUE"),
    "no tokens": (("EXPORT", "It", "--max_new_tokens", "0"), "'0' is not a positive whole number"),
    "too many tokens": (("EXPORT", "It", "--max_new_tokens", "48"), "sequence_length=48"),
    "too many beams": (("EXPORT", "It", "--num_beams", "4"), "num_beams=4.*batch_size=3"),
    "an option of export": (
        ("EXPORT", "It", "--sequence_length", "64"),
        "sequence_length=48.*cannot be changed to 64",
    ),
    "no prompt": (("EXPORT", ""), "the prompt is empty"),
    "two kinds of prompt": (("EXPORT", "It", "--interactive"), "leave 'It' out"),
    "not served": (("EXPORT", "It", "--penalty_alpha", "0.6", "--top_k", "4"), "penalty_alpha=0.6"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, cli, export, capsys, monkeypatch):
    import re

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit) as ended:
        cli(*(export if word == "EXPORT" else word for word in arguments))
    shown = capsys.readouterr()
    assert ended.value.code in (1, 2) and shown.out == ""
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("optimum-cli neuron generate: error: ") and re.search(message, last), shown.err
    assert "Traceback" not in shown.err


def test_a_model_without_a_tokenizer(cli, tmp_path, capsys):
    tiny_opt().save_pretrained(tmp_path / "source")
    with pytest.raises(SystemExit):
        cli(tmp_path / "source", "It")
    assert "has no tokenizer that can be read: put tokenizer.json" in capsys.readouterr().err


def test_text_streams(export):
    """The first words are there before the last are computed: the pipe is read word by word."""
    program = "import sys; from optimum.commands import optimum_cli; sys.argv[0] = 'optimum-cli'; optimum_cli.main()"
    command = [sys.executable, "-c", program, "neuron", "generate", str(export), PROMPT, "--eos_token_id", "null"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
        assert process.stdout is not None
        pieces = []
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(piece)
    assert process.returncode == 0 and len(pieces) > 3
