"""Runs the tests on each combination of Python, torch, transformers and optimum that the package supports.

python tests/matrix.py                                     # all of them; each takes a new environment, and a while
python tests/matrix.py --python 3.12 tests/generation      # some of them, and some of the tests
python tests/matrix.py --list                              # only says which there are

A combination needs its interpreter on PATH, as python3.12 and the like. Each result is a row for docs/tested.md, on
stdout; what pip and pytest say is on stderr. From Python 3.12 on, PyPI's torch for Linux has CUDA libraries of several
gigabytes. CI runs only the first combination.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Combination:
    """Versions to install; `newest` is what pip finds. `optimum_neuron` says whether it is installed."""

    python: str
    torch: str
    transformers: str
    optimum: str
    optimum_neuron: bool = False

    def requirements(self) -> list[str]:
        """What to install before the package, which is installed without its dependencies."""
        pinned = {"torch": self.torch, "transformers": self.transformers, "optimum": self.optimum}
        named = [name if version == "newest" else f"{name}=={version}" for name, version in pinned.items()]
        others = ["filelock>=3.30", "huggingface_hub", "requests", "safetensors", "tqdm"]
        tools = [
            "hypothesis",
            "matplotlib",
            "peft",
            "pillow",
            "pytest",
            "pytest-xdist",
            "scipy",
            "setuptools>=77",
            "wheel",
        ]
        return [*named, *others, *tools, *(["optimum-neuron==0.4.5"] if self.optimum_neuron else [])]


COMBINATIONS = (
    Combination("3.11", "2.13.0", "4.57.6", "2.0.0", optimum_neuron=True),
    Combination("3.10", "2.8.0", "4.57.6", "2.0.0", optimum_neuron=True),
    Combination("3.11", "2.13.0", "newest", "newest"),
    Combination("3.12", "2.13.0", "4.57.6", "newest"),
    Combination("3.12", "2.13.0", "newest", "newest"),
    Combination("3.13", "newest", "newest", "newest"),
)


def run(combination: Combination, tests: list[str]) -> str:
    """Installs the combination in a new environment and runs the tests; a row for docs/tested.md."""
    interpreter = shutil.which(f"python{combination.python}")
    if interpreter is None:
        return row(combination, f"not run: there is no python{combination.python} on PATH")
    with tempfile.TemporaryDirectory(prefix="optimum_opt_trn-matrix-") as directory:
        python = Path(directory) / "bin" / "python"
        steps = (
            [interpreter, "-m", "venv", directory],
            [python, "-m", "pip", "install", "-q", *combination.requirements()],
            [python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT],
        )
        for step in steps:
            if subprocess.run(step, stdout=sys.stderr).returncode:
                return row(combination, "pip failed")
        command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        sys.stderr.write(result.stdout)
        closing = [line for line in result.stdout.splitlines() if " in " in line][-1:]
        return row(combination, closing[0].strip("= ") if closing else "no test ran")


def row(combination: Combination, result: str) -> str:
    versions = f"{combination.python} | {combination.torch} | {combination.transformers} | {combination.optimum}"
    return f"| {versions} | {'yes' if combination.optimum_neuron else 'no'} | {result} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", metavar="3.N", help="only combinations of this Python")
    parser.add_argument("--list", action="store_true", help="only list the combinations")
    parser.add_argument("tests", nargs="*", default=["tests"], help="what pytest runs (default: tests)")
    arguments = parser.parse_args()
    chosen = [c for c in COMBINATIONS if not arguments.python or c.python in arguments.python]
    if not chosen:
        parser.error(f"--python {' '.join(arguments.python)}: choose of {', '.join(c.python for c in COMBINATIONS)}")
    print("| Python | torch | transformers | optimum | optimum-neuron | tests |\n|---|---|---|---|---|---|")
    for combination in chosen:
        print(row(combination, "") if arguments.list else run(combination, arguments.tests), flush=True)


if __name__ == "__main__":
    main()
