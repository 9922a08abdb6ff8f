#!/usr/bin/env python
"""How fast OPT decodes on this CPU: ours and every peer, in turns, beside the bandwidth that the memory has.

    python benchmarks/decode_cpu.py --shapes tiny --peers transformers-f32 --in_place --eager  # a minute, to try it
    python benchmarks/decode_cpu.py --shapes 125m                                        # all peers, one shape
    python benchmarks/decode_cpu.py --full --directory /scratch/opt --keep               # everything, for hours

OPT checkpoints of the published shapes are made with random weights. Each peer gets a virtual environment with the
packages of benchmarks/peers/*.txt, which pip installs once. Then, for each peer: it and ours are loaded, each in its
process, and take turns of a few steps, a probe of the read bandwidth before each. So every ratio is of times that
were taken within seconds of each other, and every share of the roofline is of the bandwidth that was there.

--output gets decode_cpu.json (every time that was taken), .md (tables) and .png, anew after each peer and batch
size: a run that is ended loses nothing. At the end each claim of the CPU target is printed, with `pass`, `short` or
`not measured`. A peer that cannot be set up or run is named with its error, and the run goes on. What each figure
means, and the settings of each peer: docs/speed.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from peers import groups
from speed.checkpoints import SHAPES
from speed.claims import check
from speed.session import FIGURES, Choice, Session
from speed.workers import Workplace


HERE = Path(__file__).parent
POSITIONS = 2048
DEFAULT_SHAPES = [shape for shape in SHAPES if shape not in ("6.7b", "tiny")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Inductor's search takes minutes for each batch size and context.
    default_groups = [name for name in groups() if "-tuned-" not in name and not name.endswith("-passive")]
    what = parser.add_argument_group("what to measure")
    what.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES, choices=list(SHAPES), metavar="SHAPE",
                      help=f"of {', '.join(SHAPES)} (default: all but 6.7b and tiny)")  # fmt: skip
    what.add_argument("--peers", nargs="+", choices=list(groups()), metavar="PEER",
                      help=f"of {', '.join(groups())} (default: without transformers-tuned-*, and with *-passive, "
                      "whose OpenMP threads sleep while they wait, only if --busy)")  # fmt: skip
    what.add_argument("--figures", nargs="+", default=list(FIGURES), choices=FIGURES, metavar="FIGURE",
                      help=f"of {', '.join(FIGURES)} (default: all)")  # fmt: skip
    what.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N",
                      help="rows (default: 1 2 4 8)")  # fmt: skip
    what.add_argument("--contexts", nargs="+", type=int, default=[64, 512, 1536], metavar="N",
                      help="tokens of the prompt that decoding goes on from (default: 64 512 1536); beyond batch 1 "
                      "the shortest alone, without --full")  # fmt: skip
    what.add_argument("--prompts", nargs="+", type=int, metavar="N",
                      help="tokens of prompts whose first token is timed, at batch 1 (default: 32 512, and with "
                      "--full 1536)")  # fmt: skip
    what.add_argument("--full", action="store_true", help="all contexts at all batch sizes, and the longest prompt")
    what.add_argument("--zeros", type=float, metavar="SHARE",
                      help="plant so many zeros among fc2's inputs, as trained models have them, 0.5 to 0.99, by a "
                      "shift of fc1's bias (default: as random weights make them, half)")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--busy", type=int, default=0, metavar="N",
                     help="run so many processes of plain work beside each measurement, and measure each without them "
                     "too (default: 0)")  # fmt: skip
    how.add_argument("--rounds", type=int, default=5, help="timed runs of each figure (default: 5)")
    how.add_argument("--steps", type=int, help="of a timed run of decoding (default: 32 of 125m, else 8)")
    how.add_argument("--loads", type=int, default=3, help="timed starts and loads of each peer (default: 3)")
    how.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                     help="of each contender and of the probe (default: as many as there are cores)")  # fmt: skip
    how.add_argument("--patience", type=float, default=1800, metavar="S",
                     help="seconds after which a contender that does not answer is ended (default: 1800)")  # fmt: skip
    where = parser.add_argument_group("where")
    where.add_argument("--directory", type=Path,
                       help="for checkpoints and conversions, some 10 GB for 1.3b and 25 GB for 2.7b "
                       "(default: a temporary one)")  # fmt: skip
    where.add_argument("--keep", action="store_true",
                       help="leave them there; what is there is used again, our exports too: remove them "
                       "(SHAPE/ours-*) after a change of the library")  # fmt: skip
    where.add_argument("--environments", type=Path, default=HERE / ".venv",
                       help="for the peers' virtual environments, which stay (default: benchmarks/.venv)")  # fmt: skip
    where.add_argument("--in_place", action="store_true",
                       help="run peers in this interpreter, without environments of their own")  # fmt: skip
    where.add_argument("--eager", action="store_true",
                       help="export ours without compiling, to try this command: the times mean nothing")  # fmt: skip
    where.add_argument("--output", type=Path, default=HERE / "results",
                       help="for the report (default: benchmarks/results)")  # fmt: skip
    given = parser.parse_args(arguments)
    if given.peers is None:
        passive = [name for name in groups() if name.endswith("-passive")]
        given.peers = default_groups + (passive if given.busy else [])
    if given.busy < 0:
        parser.error(f"--busy {given.busy}: it must be 0 or more")
    if given.zeros is not None and not 0.5 <= given.zeros < 1:
        parser.error(f"--zeros {given.zeros}: choose a share from 0.5 to below 1")
    if given.prompts is None:
        given.prompts = [32, 512, 1536] if given.full else [32, 512]
    for name in ("batches", "contexts", "prompts", "rounds", "steps", "loads", "threads"):
        value = getattr(given, name)
        if any(number < 1 for number in (value if isinstance(value, list) else [value or 1])):
            parser.error(f"--{name} {value}: numbers must be 1 or more")
        if isinstance(value, list):
            setattr(given, name, sorted(set(value)))
    choice = _choice(given)
    for shape, batch in ((shape, batch) for shape in given.shapes for batch in given.batches):
        if (length := choice.plan(shape, batch).length) > POSITIONS:
            parser.error(
                f"--contexts {given.contexts}, --prompts {given.prompts}, --rounds {given.rounds}: rows of {length} "
                f"tokens are needed for {shape}, which has {POSITIONS} positions: choose shorter ones, fewer rounds, "
                "or fewer --steps"
            )
    if given.keep and given.directory is None:
        parser.error("--keep: give the --directory to keep things in")
    return given


def _choice(given: argparse.Namespace) -> Choice:
    return Choice(
        shapes=tuple(given.shapes),
        groups=tuple(given.peers),
        figures=tuple(given.figures),
        batches=tuple(given.batches),
        contexts=tuple(given.contexts),
        prompts=tuple(given.prompts),
        rounds=given.rounds,
        loads=given.loads,
        steps=given.steps,
        full=given.full,
        busy=given.busy,
        zeros=given.zeros,
    )


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and temporary folders go, too
    with ExitStack() as stack:
        directory = given.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decode-cpu-")))
        environments = None if given.in_place else given.environments.absolute()
        place = Workplace(directory.absolute(), environments, given.threads, given.patience, given.eager)
        session = Session(_choice(given), place, given.output, given.keep, lambda text: print(text, flush=True))
        session.run()
    print(f"\nWritten to {given.output}.\n")
    for claim in check(session.records, given.busy, given.zeros):
        print(claim)
    return 0


if __name__ == "__main__":
    sys.exit(main())
