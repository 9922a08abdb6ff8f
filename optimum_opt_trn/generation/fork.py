"""What keeps models usable in a fork of the process that loaded them (gunicorn's preload, multiprocessing's fork).

A fork has only the thread that called it. A lock that another thread held stays locked in the child, and torch's
threads (libgomp's) are waited for and never come. The kernels' own threads are started anew by
`targets/cpu/csrc/pool.cpp`. The Neuron runtime does not work in a fork, and `targets/neuron/process.py` raises.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from .slots import Slots


if TYPE_CHECKING:
    from .engine import Engine

_engines: WeakSet[Engine] = WeakSet()


def survive_fork(engine: Engine) -> None:
    """Keeps `engine` usable in forks of this process. torch has one thread there, as in a DataLoader's workers."""
    _engines.add(engine)


def _in_child() -> None:
    for engine in list(_engines):
        if engine.lock.acquire(blocking=False):  # free, or held by the thread that called fork
            engine.lock.release()
            continue
        # Another thread was in a call, which goes on only in the parent.
        engine.lock, engine.slots = threading.RLock(), Slots(engine.slots.batch_size)
        engine._may_generate = True
    if len(_engines):
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_in_child)
