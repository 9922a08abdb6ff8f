"""`optimum-cli neuron generate`: continues a text in the terminal.

optimum-cli loads this file at every start, so whatever is heavy is imported when the command runs.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import common
from .export import SHARED_OPTIONS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..modeling_neuron_opt import NeuronOPTForCausalLM


DEFAULT_NEW_TOKENS = 100

DESCRIPTION = """\
Generate text with an OPT model: continue a prompt, and print the text as it is made. MODEL may be an export, or a
checkpoint, which is then exported to a temporary directory first."""

EPILOG = f"""\
examples:
  optimum-cli neuron generate opt-125m-cpu "Hello, my name is"
  optimum-cli neuron generate opt-125m-cpu "Hello, my" --do_sample --temperature 0.8 --seed 1 --max_new_tokens 40
  optimum-cli neuron generate facebook/opt-125m --num_beams 4 --no_repeat_ngram_size 3 < prompt.txt
  optimum-cli neuron generate opt-125m-cpu --interactive

Any option of transformers' GenerationConfig may be given as a flag: --repetition_penalty 1.2, --stop_strings '["."]'.
Values are JSON where they can be read as such, otherwise text. Without a length, {DEFAULT_NEW_TOKENS} tokens are
generated, or as many as the export has room for. Only generated text goes to stdout."""


class GenerateCommand(BaseOptimumCLICommand):
    """The command; exit status 1 with one line on stderr if something is wrong."""

    COMMAND = CommandInfo(name="generate", help="Generate text with an export or a checkpoint, in the terminal.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_arguments(parser)

    def run(self) -> None:
        with common.one_line_errors("optimum-cli neuron generate", "the text ends here.", also=(NotImplementedError,)):
            run(self.args)


def add_arguments(parser: ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EPILOG)
    parser.add_argument("model", metavar="MODEL", help="An export or a checkpoint: a directory, or an id on the Hub.")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="The text to continue (default: what is on stdin)."
    )
    parser.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="Ask for one prompt after the other, each continued for itself; an empty line, Ctrl-D or 'exit' ends.",
    )
    group = parser.add_argument_group("options of generation")
    group.add_argument(
        "--max_new_tokens",
        type=common.positive,
        metavar="N",
        help=f"How many tokens to generate at most (default: {DEFAULT_NEW_TOKENS}).",
    )
    group.add_argument("--do_sample", action="store_true", default=None, help="Draw tokens by their probability.")
    group.add_argument("--temperature", type=float, metavar="T", help="Above 1 more surprising, below 1 less.")
    group.add_argument("--top_k", type=int, metavar="N", help="Draw among the N best tokens.")
    group.add_argument("--top_p", type=float, metavar="P", help="Draw among the best that make up probability P.")
    group.add_argument("--num_beams", type=common.positive, metavar="N", help="Search with N beams (no streaming).")
    group.add_argument("--seed", type=int, metavar="N", help="The same number gives the same text again.")
    group.add_argument(
        "--option", action="append", default=[], type=_option, metavar="NAME=VALUE", help="Any other option."
    )
    loading = parser.add_argument_group("options of a checkpoint that is not exported yet, and of loading")
    for flag in ("--sequence_length", "--tensor_parallel_size", "--auto_cast_type", "--cache_dir"):
        loading.add_argument(flag, **SHARED_OPTIONS[flag])
    loading.add_argument("--revision", **common.REVISION)
    loading.add_argument("--eager", action="store_true", help="Run without kernels: correct, but slower.")
    loading.add_argument("--trust_remote_code", **common.TRUST_REMOTE_CODE)
    common.explain_errors(parser)
    _take_generation_flags(parser)


def run(options: Namespace) -> None:
    """Loads the model and prints continuations.

    Raises:
        ValueError: for options that do not fit the model or each other; OSError if there is no such model.
    """
    asked = _generation_options(options)
    if options.interactive and options.prompt is not None:
        raise ValueError(f"--interactive asks for prompts: leave {options.prompt!r} out, or --interactive.")
    prompt = options.prompt
    if prompt is None and not options.interactive:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt: give one after the model, or --interactive.")
        prompt = sys.stdin.read().strip("\n")

    from transformers import set_seed

    model, tokenizer = _load(options)
    if options.seed is not None:
        set_seed(options.seed)
    if prompt is not None:
        _continue(model, tokenizer, prompt, asked)
        return
    for line in _lines():
        try:
            _continue(model, tokenizer, line, asked)
        except ValueError as error:  # a prompt that is too long, for example; the next may be shorter
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _load(options: Namespace) -> tuple[NeuronOPTForCausalLM, PreTrainedTokenizerBase]:
    from ..checkpoint.config import load_config
    from ..checkpoint.small_files import load_tokenizer
    from ..modeling_neuron_opt import NeuronOPTForCausalLM

    hub = {"revision": options.revision, "cache_dir": options.cache_dir}
    load_config(options.model, **hub)  # what is no model is told before what has no tokenizer
    try:
        tokenizer = load_tokenizer(options.model, **hub)
    except ValueError as error:
        raise ValueError(
            f"{options.model} has no tokenizer that can be read: put tokenizer.json, or vocab.json and merges.txt, "
            "next to its config.json."
        ) from error
    given = {
        "sequence_length": options.sequence_length,
        "tensor_parallel_size": options.tensor_parallel_size,
        "amp": options.auto_cast_type,
        "batch_size": _rows(options),
        **hub,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    how = {"eager": options.eager, "trust_remote_code": options.trust_remote_code}
    return NeuronOPTForCausalLM.from_pretrained(options.model, **how, **chosen), tokenizer


def _rows(options: Namespace) -> int | None:
    """Slots that a checkpoint is exported with: one for each beam. None leaves an export as it is."""
    from ..export import find_export

    hub: dict[str, Any] = {"revision": options.revision, "cache_dir": options.cache_dir}
    return None if find_export(options.model, hub) else options.num_beams


def _continue(
    model: NeuronOPTForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, asked: dict[str, Any]
) -> None:
    from transformers import TextStreamer

    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue.")
    inputs = tokenizer(prompt, return_tensors="pt")
    room = model.neuron_config.sequence_length - inputs.input_ids.shape[1]
    lengths = {} if {"max_new_tokens", "max_length"} & asked.keys() else {"max_new_tokens": DEFAULT_NEW_TOKENS}
    if lengths:
        lengths["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, room))
    words: dict[str, Any] = {"tokenizer": tokenizer} if "stop_strings" in asked else {}
    everything = {**inputs, **lengths, **asked, **words}
    if (asked.get("num_beams") or 1) > 1:  # whose tokens are known at the end
        generated = model.generate(**everything)
        print(tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True), flush=True)
        return
    model.generate(**everything, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))


def _lines() -> Iterator[str]:
    """Prompts as the user types them, until an empty line, the end of the input, or `exit`."""
    while True:
        try:
            # The question is for a terminal; input() would print it to stdout.
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = input()
        except EOFError:
            return
        if line.strip() in ("", "exit", "quit"):
            return
        yield line


def _generation_options(options: Namespace) -> dict[str, Any]:
    """The options of generate() among the arguments; ValueError for one that is not known."""
    from ..configuration_opt import reject_unknown

    own = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_beams")
    asked = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    asked.update(options.option)
    try:
        reject_unknown(asked, _option_names(), "generate()")
    except TypeError as error:
        raise ValueError(str(error)) from None
    return asked


def _take_generation_flags(parser: ArgumentParser) -> None:
    """Lets `--name value` stand for `--option name=value` where `name` is an option of generation.

    Such flags are not declared one by one: their names are known once transformers is imported, which takes seconds,
    and --help should not. Positional arguments go to the end: argparse would take a prompt behind a flag for unknown.
    """
    parse = parser.parse_known_args
    arity = {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        flags: list[str] = []
        positionals: list[str] = []
        while words:
            word = words.pop(0)
            flag, equals, value = word.partition("=")
            if word == "--":
                positionals += words
                break
            if not flag.startswith("-") or flag == "-":
                positionals.append(word)
                continue
            declared = flag in arity
            if not declared and flag.removeprefix("--") not in _option_names():
                parser.error(f"unknown argument {flag}{_nearest(flag, arity)}")
            # An option without a value is one to switch on.
            takes_value = arity[flag] if declared else bool(words) and not words[0].startswith("--")
            if takes_value and not equals and words:
                value, equals = words.pop(0), "="
            if declared:
                flags.append(f"{flag}={value}" if equals else flag)
            else:
                flags += ["--option", f"{flag.removeprefix('--')}={value if equals else 'true'}"]
        return parse([*flags, "--", *positionals], namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _option_names() -> list[str]:
    from transformers import GenerationConfig

    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]


def _nearest(flag: str, declared: Iterable[str]) -> str:
    import difflib

    nearest = difflib.get_close_matches(flag, [*declared, *(f"--{name}" for name in _option_names())], n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _option(text: str) -> tuple[str, Any]:
    import json

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE, like repetition_penalty=1.2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)
