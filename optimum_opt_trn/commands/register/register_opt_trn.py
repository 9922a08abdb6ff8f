"""Puts OPT into `optimum-cli export neuron`, and our commands into `optimum-cli neuron`.

Read at every start of optimum-cli: imports nothing heavy.
"""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from optimum.commands.register import register_export

import optimum_opt_trn  # noqa: F401  the other commands read configurations, and have to know ours
from optimum_opt_trn.commands.export import OPTExportCommand, extend
from optimum_opt_trn.commands.plan import PlanCommand


# optimum-neuron registers its own `export neuron` where the Neuron SDK is installed. argparse refuses a second command
# of that name, so there its command learns about OPT, in place; elsewhere ours is the only one.
_existing = [command for command, _ in register_export.REGISTER_COMMANDS if command.COMMAND.name == "neuron"]
if _existing:
    extend(_existing[0])
REGISTER_COMMANDS: list = [] if _existing else [(OPTExportCommand, ExportCommand)]

# optimum-cli finds the parents of what plugins register before it has registered any, so a plugin's command cannot be
# the parent of ours: its list of subcommands is extended instead. Without it `neuron` is a command of ours.
_SUBCOMMANDS = tuple(
    CommandInfo(command.COMMAND.name, command.COMMAND.help, subcommand_class=command) for command in (PlanCommand,)
)
try:
    from optimum.commands.neuron.base import NeuronCommand
except ImportError:

    class NeuronCommand(BaseOptimumCLICommand):  # type: ignore[no-redef]
        COMMAND = CommandInfo(name="neuron", help="OPT models on AWS Neuron devices.")
        SUBCOMMANDS = _SUBCOMMANDS

    REGISTER_COMMANDS.append(NeuronCommand)
else:
    NeuronCommand.SUBCOMMANDS = (*NeuronCommand.SUBCOMMANDS, *_SUBCOMMANDS)
