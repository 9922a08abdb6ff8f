"""Fuzzes the targets of fuzz_targets.py by coverage, with atheris, which is not among the packages of the tests.

pip install atheris
PYTHONPATH=tests/support nice python tests/faults/fuzz_atheris.py --cpu_minutes 30 --findings DIR

Each finding is one file in DIR for each place in the source: the input, and next to it what was raised. Prints how
often each target ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import atheris


with atheris.instrument_imports(include=["optimum_opt_trn"]):
    import fuzz_targets
    import torch
from report import where, write_section


def report(findings: Path) -> None:
    """Writes docs/reliability.md from the counts in `findings`."""
    runs, answers, seconds = Counter[str](), Counter[str](), 0.0
    for file in findings.glob("counts-*.json"):
        counts = json.loads(file.read_text())
        seconds += counts["cpu_s"]
        runs.update(counts["runs"])
        answers.update(counts["refused"])
    found = len([*findings.glob("*.txt"), *findings.glob("crash-*"), *findings.glob("timeout-*")])
    lines = [f"atheris, {where()}; {seconds / 60:.0f} minutes of processor time, {found} findings.", ""]
    lines += ["| file | runs | refused by an error that says why |", "|---|---|---|"]
    lines += [f"| {name} | {runs[name]:,} | {answers[name]:,} |" for name in fuzz_targets.TARGETS if runs[name]]
    write_section("fuzz", "\n".join([*lines, f"| all | {sum(runs.values()):,} | {sum(answers.values()):,} |"]))


# libFuzzer ends a process that hangs for so long, or takes so much memory.
TIMEOUT_S, MEMORY_MB = 60, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu_minutes", type=float, default=1.0, help="processor time to spend")
    parser.add_argument("--findings", type=Path, required=True, help="where findings, corpus and counts are written")
    parser.add_argument("--report", action="store_true", help="only write docs/reliability.md from what DIR has")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.findings)
        return
    arguments.findings.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzz_targets.make_workspace(root)
    names = list(fuzz_targets.TARGETS)
    corpus = arguments.findings / "corpus"
    corpus.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        content = bytes([index]) + (root / fuzz_targets.TARGETS[name].file).read_bytes()
        (corpus / hashlib.sha256(content).hexdigest()).write_bytes(content)
    runs: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    started = time.time()

    def one(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        (arguments.findings / "last").write_bytes(data)  # what a process that is killed was at
        try:
            answer = fuzz_targets.run(name, data[1:], root)
            answers[name] += answer is not None
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = hashlib.sha256(f"{type(error)} {place.filename} {place.lineno} {name}".encode()).hexdigest()[:12]
            if not (arguments.findings / f"{where}.txt").exists():
                (arguments.findings / f"{where}.input").write_bytes(data[1:])
                (arguments.findings / f"{where}.txt").write_text(f"{name}\n{traceback.format_exc()}")
        runs[name] += 1
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime
        if sum(runs.values()) % 200 == 0 or seconds > 60 * arguments.cpu_minutes:
            counts = {"cpu_s": seconds, "wall_s": time.time() - started, "runs": runs, "refused": answers}
            (arguments.findings / f"counts-{os.getpid()}.json").write_text(json.dumps(counts, indent=1))
        if seconds > 60 * arguments.cpu_minutes:
            os._exit(0)

    limits = [f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=20000", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={arguments.findings}/", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
