"""Processes of plain work that run beside what is measured, as a user's machine has them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


# Arithmetic in Python, within the processor's caches; it ends when its parent does.
_WORK = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(i * i for i in range(200_000))
"""


class Neighbours:
    """So many processes, which work within `working()` only, until `close`."""

    def __init__(self, count: int):
        self._processes = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(count)]
        self._send(signal.SIGSTOP)

    @contextmanager
    def working(self) -> Iterator[None]:
        self._send(signal.SIGCONT)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
