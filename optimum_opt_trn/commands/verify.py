"""`optimum-cli neuron verify`: whether the files of a split checkpoint are what was written."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .common import describe, explain_errors, one_line_errors


DESCRIPTION = """\
Verify the weights of a split checkpoint, or of an export: read every file, and compare its size and SHA-256 with the
manifest that was written with it, and names, shapes and dtypes of its tensors with config.json. Prints a line for
each problem, and ends with status 1 if there is any. (Compiled files are verified whenever an export is loaded.)"""

EPILOG = """\
examples:
  optimum-cli neuron verify opt-13b-split
  optimum-cli neuron verify opt-13b-cpu        # an export: its checkpoint/

To repair a split checkpoint, run the command that made it again: intact files are kept.
In Python: NeuronOPTForCausalLM.from_pretrained(DIR, verify=True)."""


class VerifyCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="verify", help="Check a split checkpoint or an export for missing and damaged files.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        describe(parser, DESCRIPTION, EPILOG)
        parser.add_argument("directory", metavar="DIR", type=Path, help="A split checkpoint or an export.")
        explain_errors(parser)

    def run(self) -> None:
        directory = self.args.directory
        with one_line_errors("optimum-cli neuron verify", f"{directory} was not verified."):
            from ..checkpoint.verify import find_problems

            problems = find_problems(directory)
        for problem in problems:
            print(" ".join(problem.split()), file=sys.stderr)
        if problems:
            raise SystemExit(1)
        print(f"{directory} is complete: every file is what was written.")
