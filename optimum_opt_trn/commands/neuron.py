"""`optimum-cli neuron`, the parent of our own commands, and what they have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def add_commands(commands: Sequence[type[BaseOptimumCLICommand]]) -> list[type[BaseOptimumCLICommand]]:
    """Makes `commands` subcommands of `optimum-cli neuron`; what has to be registered with optimum-cli for that.

    optimum-cli resolves parents before plugins register theirs, so that optimum-neuron's `neuron` command cannot be
    named as one: it is told of ours in the table that it makes its subcommands from. Where optimum-neuron has none,
    a parent of our own is registered.
    """
    added = tuple(
        CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
        for command in commands
    )
    try:
        from optimum.commands.neuron.base import NeuronCommand
    except ImportError:
        return [type("NeuronCommand", (_NeuronCommand,), {"SUBCOMMANDS": added})]
    NeuronCommand.SUBCOMMANDS = (*NeuronCommand.SUBCOMMANDS, *added)
    return []


class _NeuronCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="neuron", help="OPT models for AWS Neuron devices and this host's CPU.")


@contextmanager
def one_line_errors(program: str, interrupted: str) -> Iterator[None]:
    """What the user can mend ends in one line on stderr and exit status 1; Ctrl-C in what `interrupted` says."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
