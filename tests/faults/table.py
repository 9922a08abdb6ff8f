"""Tries each fault many times, and writes the table of what came of it to docs/reliability.md.

PYTHONPATH=tests/support python tests/faults/table.py --times 100 --seed 1

Prints a row for each fault as it is done. Ends with status 1, and writes nothing, if anything was lost. Faults that
this host does not allow (mounting, becoming another user) are named as not tried.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch
from faults import FAULTS, Ground, Lost, Skipped, attempt
from report import where, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often to try each fault (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="only faults whose name has this text; writes nothing")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lost: list[str] = []
    lines = ["| fault | tried | outcomes | lost or corrupted |", "|---|---|---|---|"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        ground = Ground(Path(directory))
        for name, fault in FAULTS.items():
            if arguments.only not in name:
                continue
            random, outcomes, failures = Random(f"{arguments.seed} {name}"), Counter[str](), 0
            for _ in range(arguments.times):
                try:
                    outcomes[attempt(fault, ground, random)] += 1
                except Skipped as reason:
                    outcomes[f"not tried: {reason}"] += 1
                    break
                except Lost as error:
                    failures += 1
                    lost.append(f"{name}: {error}")
            tried = sum(count for outcome, count in outcomes.items() if not outcome.startswith("not tried")) + failures
            listed = "; ".join(f"{count} × {outcome}" for outcome, count in outcomes.most_common())
            lines.append(f"| {name} | {tried} | {listed} | {failures} |")
            print(lines[-1], flush=True)
    if lost:
        print(*lost, sep="\n", file=sys.stderr)
        raise SystemExit(1)
    if not arguments.only:
        minutes = (time.monotonic() - started) / 60
        head = f"{where()}; {arguments.times} tries each, seed {arguments.seed}, {minutes:.0f} minutes."
        write_section("faults", "\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
