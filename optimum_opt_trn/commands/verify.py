"""`optimum-cli neuron verify`: whether the files of an export or a split checkpoint are what was written."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .common import describe, explain_errors, one_line_errors


DESCRIPTION = """\
Verify an export or a split checkpoint: read every file, and compare its size and SHA-256 with the manifest that was
written with it. Prints a line for each file that is missing, has changed, or does not belong, and ends with status 1
if there is any. Hidden files and README.md, which the Hub adds, are not looked at. This finds damage; it does not say
who made an export: whoever can change a file can change the manifest too."""

EPILOG = """\
examples:
  optimum-cli neuron verify opt-13b-split
  optimum-cli neuron verify opt-13b-cpu        # an export

To repair a split checkpoint or an export, run the command that made it again. A split keeps intact files.
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
            from ..checkpoint.verify import find_problems, find_unlisted

            problems = find_problems(directory)
            unlisted = [] if problems else find_unlisted(directory)
        for problem in problems:
            print(" ".join(problem.split()), file=sys.stderr)
        if problems:
            raise SystemExit(1)
        if unlisted:
            print(
                f"{directory}: the weights are what was written. An earlier version recorded no hash of "
                f"{', '.join(unlisted)}: these could not be compared. Run the command that made it again to record "
                "them."
            )
        else:
            print(f"{directory} is complete: every file is what was written.")
