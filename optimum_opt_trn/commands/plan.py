"""`optimum-cli neuron plan`: how much memory a model needs and how fast it can be, before anything is compiled.

`python -m optimum_opt_trn.commands.plan` is the same command, without the imports of optimum-cli.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..dtypes import AMP_DTYPES, DTYPES
from .common import CACHE_DIR, CAST_TYPES, REVISION, describe, one_line_errors, positive


# The name of a dtype on the command line -> ours.
_CLI_DTYPES = {DTYPES[name].cli: name for name in AMP_DTYPES}

DESCRIPTION = """\
Plan an OPT model: how much of a NeuronCore's memory its weights, cache and workspace take, what fits and what does
not, on which instance, and how fast it can be at most. Reads only config.json: no weights, no Neuron device."""

EPILOG = """\
examples:
  optimum-cli neuron plan -m facebook/opt-13b --instance trn1.2xlarge --batch_size 2
  optimum-cli neuron plan -m ./opt-66b/config.json --batch_size 16            (chooses the instance)
  optimum-cli neuron plan -m ./opt-13b --instance trn1.2xlarge --json | jq .fits

The reserve of 1.25 GiB a core is calibrated, not measured on a device; see docs/memory.md."""


class PlanCommand(BaseOptimumCLICommand):
    """The command. Exit status 0 whether the model fits or not; 1, with one line on stderr, after an error."""

    COMMAND = CommandInfo(name="plan", help="Plan an OPT model's memory and speed before compiling it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_arguments(parser)

    def run(self) -> None:
        run(self.args)


def add_arguments(parser: ArgumentParser) -> None:
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("-m", "--model", required=True, help="Model id on the Hub, a local directory, or a config.json.")
    add(
        "--instance",
        metavar="NAME",
        help="EC2 instance such as trn1.2xlarge, or cpu for this host (default: the first that fits, fewest chips "
        "first).",
    )
    add("--batch_size", type=positive, default=1, metavar="N", help="Sequences at once (default: 1).")
    add(
        "--sequence_length",
        type=positive,
        metavar="N",
        help="Tokens of prompt and continuation (default: the positions that the model has).",
    )
    add(
        "--tensor_parallel_size",
        type=positive,
        metavar="N",
        help="NeuronCores to split the model over (default: the fewest that fit).",
    )
    add(
        "--auto_cast_type",
        choices=CAST_TYPES,
        default="fp16",
        help="Dtype of the weights (default: fp16).",
    )
    add(
        "--weight_dtype",
        choices=("int8",),
        help="int8 for the matrices of attention, MLP and head, with a float32 scale for each output channel "
        "(default: the dtype of --auto_cast_type).",
    )
    add(
        "--kv_cache_dtype",
        choices=CAST_TYPES,
        help="Dtype of the key/value cache (default: the dtype of --auto_cast_type).",
    )
    add("--revision", **REVISION)
    add("--cache_dir", **CACHE_DIR)
    add("--json", action="store_true", help="Print one JSON object: bytes, seconds, tokens per second.")
    add("--plot", metavar="FILE", help="Also draw memory and speed, to a .png or .svg file (needs matplotlib).")


def run(options: Namespace) -> None:
    with one_line_errors("optimum-cli neuron plan", "there is no plan.", also=(ImportError,)):
        from ..planning.plan import choose_plan, plan_everywhere, read_shape
        from ..planning.setup import Setup
        from .plan_text import compare, describe_plan

        config = read_shape(options.model, options.revision, options.cache_dir)
        setup = Setup(
            batch_size=options.batch_size,
            sequence_length=options.sequence_length or config.max_position_embeddings,
            amp=_CLI_DTYPES[options.auto_cast_type],
            weight_dtype=options.weight_dtype,
            kv_cache_dtype=_CLI_DTYPES[options.kv_cache_dtype] if options.kv_cache_dtype else "",
        )
        plan = choose_plan(config, setup, options.instance, options.tensor_parallel_size)
        if options.plot:
            from .plan_chart import draw

            draw(plan, options.model, options.plot)
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    lines = [*describe_plan(plan, options.model), "", *compare(list(plan_everywhere(config, setup)))]
    print("\n".join(lines))


def main() -> None:
    parser = ArgumentParser(prog="python -m optimum_opt_trn.commands.plan")
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
