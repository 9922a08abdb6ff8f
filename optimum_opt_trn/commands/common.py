"""What the commands have in common: options, and errors in one line.

optimum-cli loads this file at every start, so it imports nothing heavy.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..dtypes import AMP_DTYPES, DTYPES


CAST_TYPES = tuple(DTYPES[name].cli for name in AMP_DTYPES)

# Options of several commands: the flag, and the settings of `add_argument`.
AUTO_CAST_TYPE: dict[str, Any] = {
    "choices": CAST_TYPES,
    "help": "Dtype of attention, MLP, embedding and output weights; layernorms stay float32 (default: fp16).",
}
WEIGHT_DTYPE: dict[str, Any] = {
    "choices": ("int8",),
    "help": "int8 for the matrices of attention, MLP and head, with a float32 scale for each output channel: half the "
    "bytes of fp16 (default: the dtype of --auto_cast_type, or int8 if the checkpoint is in int8).",
}
REVISION: dict[str, Any] = {
    "metavar": "REV",
    "help": "Branch, tag or commit of a model on the Hub (default: main).",
}
ADAPTER: dict[str, Any] = {
    "action": "append",
    "metavar": "DIR_OR_ID[=WEIGHT]",
    "help": "LoRA adapter of PEFT to merge into the weights, in float32, with a factor if that is not 1. Give the "
    "option once for each adapter (default: none).",
}
CACHE_DIR: dict[str, Any] = {
    "metavar": "DIR",
    "help": "Where downloads are kept (default: the Hugging Face cache).",
}
TRUST_REMOTE_CODE: dict[str, Any] = {
    "action": "store_true",
    "help": "Load an export for Neuron devices that was compiled by somebody else, which runs code of it. Exports for "
    "cpu hold no code.",
}


def describe(parser: ArgumentParser, description: str, epilog: str) -> None:
    """Gives `parser` texts whose lines stay as they are written."""
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description, parser.epilog = description, epilog


def positive(text: str) -> int:
    """The type of an option that is a positive whole number."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """The type of an option that is a comma-separated list of whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a comma-separated list of lengths, like 128,512,2048") from None


def explain_errors(parser: ArgumentParser) -> None:
    """Makes `parser` answer a usage error in one line, and an unknown option by naming the nearest known one."""
    parse = parser.parse_known_args

    def error(message: str) -> NoReturn:
        parser.exit(2, f"{parser.prog}: error: {message} (--help explains the options)\n")

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, unknown = parse(*args, **kwargs)
        if unknown:
            import difflib

            flag = unknown[0].partition("=")[0]
            known = [known for action in parser._actions for known in action.option_strings]
            nearest = difflib.get_close_matches(flag, known, n=1)
            error(f"unknown argument {flag}" + (f", did you mean {nearest[0]}?" if nearest else ""))
        return namespace, unknown

    parser.error = error  # type: ignore[method-assign]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def quiet() -> None:
    """Has optimum-neuron not name each configuration file that it reads."""
    logging.getLogger("optimum.neuron.configuration_utils").setLevel(logging.WARNING)


@contextmanager
def one_line_errors(program: str, interrupted: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Ends an error that the user can correct in one line on stderr and exit status 1.

    Args:
        program: what the line begins with.
        interrupted: what to say after Ctrl-C, which ends with status 130.
        also: errors that end in this way besides OSError, ValueError and TargetError.
    """
    quiet()
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, *also)):
            from ..targets import TargetError

            if not isinstance(error, TargetError):
                raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
