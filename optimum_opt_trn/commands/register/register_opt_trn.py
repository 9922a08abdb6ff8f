"""Adds OPT to `optimum-cli export neuron`, and our commands to `optimum-cli neuron`.

optimum-cli loads this file at every start, so it imports nothing heavy.
"""

from contextlib import suppress

from optimum.commands.export.base import ExportCommand

import optimum_opt_trn  # noqa: F401  so that other commands can read our configurations
from optimum_opt_trn.commands.doctor import DoctorCommand
from optimum_opt_trn.commands.export import OPTExportCommand, extend
from optimum_opt_trn.commands.generate import GenerateCommand
from optimum_opt_trn.commands.neuron import add_commands
from optimum_opt_trn.commands.plan import PlanCommand
from optimum_opt_trn.commands.split import SplitCommand
from optimum_opt_trn.commands.verify import VerifyCommand


# optimum-neuron registers its own `export neuron` where the Neuron SDK is installed. argparse refuses a second command
# of that name, so that command is extended for OPT in place. Without the SDK, ours is the only one.
_existing = []
with suppress(ImportError):  # without optimum-neuron
    from optimum.commands.register import register_export

    _existing = [command for command, _ in register_export.REGISTER_COMMANDS if command.COMMAND.name == "neuron"]
if _existing:
    extend(_existing[0])
_export = [] if _existing else [(OPTExportCommand, ExportCommand)]
REGISTER_COMMANDS = [
    *_export,
    *add_commands([DoctorCommand, GenerateCommand, PlanCommand, SplitCommand, VerifyCommand]),
]
