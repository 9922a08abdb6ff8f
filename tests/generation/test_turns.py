"""The lock that threads get in turn."""

from __future__ import annotations

import threading
import time

import pytest

from optimum_opt_trn.generation.turns import TurnLock


def test_who_waits_is_next():
    """A thread that takes the lock again and again lets another in after at most one more turn."""
    lock, counted, waiting = TurnLock(), [0], threading.Event()

    def waits() -> None:
        waiting.set()
        with lock:
            counted.append(counted[0])

    with lock:
        thread = threading.Thread(target=waits)
        thread.start()
        waiting.wait()
        while not lock._next.locked():  # until it waits for the lock
            time.sleep(0.001)
    for _ in range(1000):
        with lock:
            counted[0] += 1
    thread.join()
    assert counted[1] <= 1


def test_it_is_reentrant_and_free_after_errors():
    lock = TurnLock()
    with pytest.raises(ZeroDivisionError), lock, lock:
        raise ZeroDivisionError
    done = []

    def take() -> None:
        with lock:
            done.append(True)

    thread = threading.Thread(target=take)
    with lock, lock:
        thread.start()
        thread.join(0.05)
        assert done == []
    thread.join()
    assert done == [True]
