"""`optimum-cli neuron`, the parent of our own commands."""

from __future__ import annotations

from collections.abc import Sequence

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def add_commands(commands: Sequence[type[BaseOptimumCLICommand]]) -> list[type[BaseOptimumCLICommand]]:
    """Makes `commands` subcommands of `optimum-cli neuron`; returns what has to be registered with optimum-cli.

    optimum-cli looks up the parents of commands before plugins register any command, so that the `neuron` command of
    optimum-neuron cannot be named as a parent. Our commands are added to the table that it makes its subcommands
    from. If optimum-neuron has no such command, a parent of our own is registered.
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
