"""What keeps models usable in a fork of the process that loaded them (gunicorn's preload, multiprocessing's fork).

A fork has only the thread that called it. A lock that another thread held stays locked in the child, and torch's
threads (libgomp's) are waited for and never come. The kernels' own threads are started anew by
`targets/cpu/csrc/pool.cpp`. The Neuron runtime does not work in a fork, and `targets/neuron/process.py` raises.
"""

from __future__ import annotations

import os
import threading
from functools import cached_property
from typing import Protocol
from weakref import WeakSet

import torch

from ..targets import Step


class Survivor(Protocol):
    """What is made usable again in a fork."""

    def after_fork(self) -> None: ...


_survivors: WeakSet[Survivor] = WeakSet()


def survive_fork(survivor: Survivor) -> None:
    """Keeps it usable in forks of this process. torch has one thread there, as in a DataLoader's workers."""
    _survivors.add(survivor)


def _in_child() -> None:
    for part in vars(Step).values():
        # Before Python 3.12, a cached property has one lock for all objects, which another thread may have held.
        if isinstance(part, cached_property) and hasattr(part, "lock"):
            part.lock = threading.RLock()
    for survivor in list(_survivors):
        survivor.after_fork()
    if len(_survivors):
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_in_child)
