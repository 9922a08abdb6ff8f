"""The peers' virtual environments: made from the file of their name, used again while that is the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


REQUIREMENTS = Path(__file__).parent.parent / "peers"
# The requirements that an environment was made with, written when it is whole.
STAMP = "requirements.txt"


class EnvironmentFailed(RuntimeError):
    """A peer's environment cannot be made here; the message has pip's last words."""


def environment(name: str, root: Path) -> Path:
    """The interpreter of the environment `name` in `root`, which is made if it is missing or another.

    Every package is pinned in the file, and pip installs no others (--no-deps).

    Raises:
        EnvironmentFailed: if it cannot be made, or its torch is built for GPUs.
    """
    requirements = (REQUIREMENTS / f"{name}.txt").read_text()
    directory = root / name
    python, stamp = directory / "bin" / "python", directory / STAMP
    if stamp.is_file() and stamp.read_text() == requirements:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    _run([sys.executable, "-m", "venv", directory])
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run([*pip, "-r", REQUIREMENTS / f"{name}.txt"])
    built_for = _run([python, "-c", "import torch; print(torch.version.cuda)"]).strip()
    if built_for != "None":
        raise EnvironmentFailed(
            f"{directory} got a torch for CUDA {built_for}: set PIP_EXTRA_INDEX_URL to PyTorch's index of builds for "
            "CPUs, and try again."
        )
    stamp.write_text(requirements)
    return python


def _run(command: list) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentFailed(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout
