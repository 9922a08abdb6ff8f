"""A lock that threads get in turn."""

from __future__ import annotations

import threading
from types import TracebackType


class TurnLock:
    """A reentrant lock. A thread that gives it back gets it again only after one that waits for it already.

    So a thread that computes step by step, with the lock held for each, lets others in between two steps.
    """

    def __init__(self) -> None:
        # Held by the thread that is next, until it has the lock.
        self._next = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._depth += 1
            return
        with self._next:
            self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()

    def after_fork(self) -> bool:
        """Makes the lock usable in a fork; called there.

        Returns:
            Whether another thread had it, which goes on only in the parent. It is free then.
        """
        self._next = threading.Lock()  # nobody waits any more
        if self._owner == threading.get_ident():
            return False
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return False
        self._lock, self._owner, self._depth = threading.Lock(), None, 0
        return True
