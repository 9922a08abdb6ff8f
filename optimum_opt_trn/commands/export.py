"""`optimum-cli export neuron` for OPT: a command of our own, or optimum-neuron's extended for OPT.

optimum-cli loads this file at every start, so heavy modules are imported only when a command runs.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..dtypes import AMP_DTYPES, DTYPES
from ..hardware import FAMILIES
from .common import (
    ADAPTER,
    AUTO_CAST_TYPE,
    CACHE_DIR,
    CAST_TYPES,
    REVISION,
    WEIGHT_DTYPE,
    describe,
    explain_errors,
    lengths,
    one_line_errors,
)


TASKS = ("auto", "text-generation")
INSTANCE_TYPES = tuple(FAMILIES)

DESCRIPTION = """\
Export an OPT model: split its checkpoint, compile it for a target, and write the result to a directory that
NeuronOPTForCausalLM.from_pretrained and pipeline("text-generation", ...) load without compiling again."""

EPILOG = """\
examples:
  optimum-cli export neuron -m facebook/opt-125m opt-125m-cpu
  optimum-cli export neuron -m ./my-opt --batch_size 4 --sequence_length 512 --tensor_parallel_size 2 \\
      --auto_cast_type bf16 --kv_cache_dtype fp32 my-opt-cpu
  optimum-cli export neuron -m facebook/opt-6.7b --adapter me/opt-6.7b-lora opt-6.7b-lora-cpu
  optimum-cli export neuron -m Salesforce/blip2-opt-2.7b blip2-opt-cpu   # the OPT in it

OUTPUT will hold:
  config.json, generation_config.json, tokenizer files   as in the source
  neuron_config.json    the options of the export
  checkpoint/           the weights: an ordinary Hugging Face checkpoint, one safetensors file per decoder layer
  compiled/             what was compiled for the target, and its manifest
  export_manifest.json  size and SHA-256 of every file, for `optimum-cli neuron verify`

use it:
  optimum-cli neuron generate opt-125m-cpu "Hello, my"
  from optimum_opt_trn import pipeline
  pipeline("text-generation", "opt-125m-cpu")("Hello, my", max_new_tokens=20)"""


# The options that optimum-neuron's command has too (there with choices and defaults that are not made for OPT) ...
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--task": {"choices": TASKS, "help": "What to export the model for. OPT does text-generation (default: auto)."},
    "--batch_size": {"type": int, "metavar": "N", "help": "Sequences that a call holds at most (default: 1)."},
    "--sequence_length": {
        "type": int,
        "metavar": "N",
        "help": "Tokens of prompt and continuation that a sequence holds at most (default: the positions that the "
        "model has, 2048 for most).",
    },
    "--tensor_parallel_size": {
        "type": int,
        "metavar": "N",
        "help": "Ranks to split the model over: NeuronCores, or parts of one process on cpu. Must divide the "
        "attention heads (default: 1).",
    },
    "--auto_cast_type": AUTO_CAST_TYPE,
    "--torch_dtype": {
        "choices": tuple(DTYPES[name].torch for name in AMP_DTYPES),
        "help": "The same as --auto_cast_type, in torch's names.",
    },
    "--instance_type": {
        "choices": INSTANCE_TYPES,
        "help": "What the export will run on. All except cpu need the Neuron SDK, but no device to export (default: "
        "this host if it is a Neuron instance, otherwise cpu).",
    },
    "--cache_dir": CACHE_DIR,
}
# ... and those that it lacks.
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "--weight_dtype": WEIGHT_DTYPE,
    "--kv_cache_dtype": {
        "choices": CAST_TYPES,
        "help": "Dtype of the key/value cache; fp32 on cpu gives transformers' tokens exactly (default: the weights' "
        "dtype).",
    },
    "--max_topk": {
        "type": int,
        "metavar": "N",
        "help": "How many of the most likely tokens sampling on the device chooses among (default: 256).",
    },
    "--prompt_buckets": {
        "type": lengths,
        "metavar": "N,N,...",
        "help": "Prompt lengths, in tokens, to compile for; a prompt takes the smallest that fits, and the last is "
        "the sequence length. For Neuron targets: cpu takes any length (default: doubling from 128).",
    },
    "--cache_buckets": {
        "type": lengths,
        "metavar": "N,N,...",
        "help": "Cache lengths, in tokens, that a step reads. For Neuron targets (default: doubling from 128).",
    },
    "--prompt_embeddings": {
        "action": "store_const",
        "const": True,
        "help": "Compile a graph more, which takes prompts as embeddings (inputs_embeds), as BLIP-2 needs. For Neuron "
        "targets: cpu takes them in any case.",
    },
    "--adapter": ADAPTER,
    "--revision": REVISION,
    "--force": {
        "action": "store_const",
        "const": True,
        "help": "Export a model even if it does not fit the memory of the device (see optimum-cli neuron plan).",
    },
    "--eager": {
        "action": "store_const",
        "const": True,
        "help": "Compile nothing: quick to export; the model runs correctly but slower.",
    },
}


class OPTExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export neuron` on a host without the Neuron SDK: only for OPT, and by default for the CPU."""

    COMMAND = CommandInfo(name="neuron", help="Export OPT models for AWS Neuron devices, or for this host's CPU.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        describe(parser, DESCRIPTION, EPILOG)
        required = parser.add_argument_group("required")
        required.add_argument("-m", "--model", required=True, help="Model id on the Hub, or a local directory.")
        required.add_argument(
            "output",
            metavar="OUTPUT",
            type=Path,
            help="Directory to write: new, empty, or an earlier export, which is replaced.",
        )
        group = parser.add_argument_group("options")
        for flag, settings in (SHARED_OPTIONS | OWN_OPTIONS).items():
            group.add_argument(flag, **settings)
        explain_errors(parser)

    def run(self) -> None:
        _run({name: value for name, value in vars(self.args).items() if value is not None and name != "func"})


def extend(command: type[BaseOptimumCLICommand]) -> None:
    """Makes optimum-neuron's `command` export OPT as well, in place. Nothing changes for other models."""
    parse_args, run = command.parse_args, command.run

    def parse_args_with_opt(parser: ArgumentParser) -> None:
        parse_args(parser)
        for flag, choices in (("--auto_cast_type", CAST_TYPES), ("--instance_type", INSTANCE_TYPES)):
            action = _action(parser, flag)
            # A new list, since optimum-neuron uses the old one elsewhere.
            action.choices = list(dict.fromkeys([*(action.choices or ()), *choices]))
            action.required = False
        group = parser.add_argument_group(
            "OPT models",
            "Options for OPT only, which optimum_opt_trn exports. It also takes --task, --batch_size, "
            "--sequence_length, --tensor_parallel_size, --auto_cast_type or --torch_dtype, --instance_type and "
            "--cache_dir. By default, weights are fp16.",
        )
        for flag, settings in OWN_OPTIONS.items():
            group.add_argument(flag, **settings)
        explain_errors(parser)

    def run_with_opt(self: BaseOptimumCLICommand) -> None:
        # The namespace does not show which options were given, and the defaults are not for OPT.
        argv = sys.argv[3:]
        parser = ArgumentParser(prog=self.parser.prog)
        parse_args_with_opt(parser)
        for action in parser._actions:
            action.default = SUPPRESS
        given = vars(parser.parse_args(argv))
        if given.get("task", "auto") in TASKS and _is_opt(given):
            known = {"model", "output", *(flag.removeprefix("--") for flag in (*SHARED_OPTIONS, *OWN_OPTIONS))}
            foreign = [action.option_strings[-1] for action in parser._actions if action.dest in given.keys() - known]
            _run(given, foreign)
            return
        # The options added above are not for this model: the original parser refuses them.
        parser = ArgumentParser(prog=self.parser.prog)
        parse_args(parser)
        parser.parse_args(argv)
        run(self)

    command.parse_args = staticmethod(parse_args_with_opt)
    command.run = run_with_opt


def _run(options: dict[str, Any], foreign: list[str] | None = None) -> None:
    """Exports; an error that the user can correct ends in one line on stderr and exit status 1."""
    with one_line_errors("optimum-cli export neuron", f"{options['output']} is unchanged."):
        if foreign:
            raise ValueError(f"no meaning for OPT models: {', '.join(foreign)}. Leave it out.")
        _export(**{name: value for name, value in options.items() if name != "task"})  # there is only one


def _export(
    model: str,
    output: Path,
    auto_cast_type: str | None = None,
    torch_dtype: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    eager: bool = False,
    force: bool = False,
    **options: Any,
) -> None:
    """Checks everything, then exports.

    Raises:
        ValueError: if the model is not an OPT, an option does not fit it, or the device's memory is too small.
        OSError: if the model cannot be found, or the output cannot be written.
        TargetError: if the target is not available on this host, or refuses the model.
    """
    from ..checkpoint.config import load_config
    from ..dtypes import normalize_dtype
    from ..export import export_opt
    from ..modeling_neuron_opt import NeuronOPTForCausalLM

    named = [
        normalize_dtype(value, option)
        for option, value in (("--auto_cast_type", auto_cast_type), ("--torch_dtype", torch_dtype))
        if value is not None
    ]
    if len(set(named)) > 1:
        raise ValueError(f"--auto_cast_type {auto_cast_type} and --torch_dtype {torch_dtype} disagree: give one.")
    config = load_config(model, revision=revision, cache_dir=cache_dir)
    neuron_config = NeuronOPTForCausalLM.get_neuron_config(
        model, config=config, revision=revision, amp=named[0] if named else None, **options
    )
    how: dict[str, Any] = {"eager": eager, "force": force, "revision": revision, "cache_dir": cache_dir}
    export_opt(model, output, neuron_config, config=config, **how)
    print(f'Exported to {output}. Try it: optimum-cli neuron generate {output} "Hello, my"')


def _is_opt(options: dict[str, Any]) -> bool:
    from transformers import PretrainedConfig

    from ..checkpoint.config import opt_values

    where = {name: options[name] for name in ("revision", "cache_dir", "subfolder") if name in options}
    try:
        return opt_values(PretrainedConfig.get_config_dict(options["model"], **where)[0]) is not None
    except (OSError, ValueError):  # a diffusion model has no config.json; optimum-neuron explains what is wrong
        return False


def _action(parser: ArgumentParser, flag: str) -> Action:
    return next(action for action in parser._actions if flag in action.option_strings)
