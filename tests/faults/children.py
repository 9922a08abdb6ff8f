"""Runs a function in a fork of this process, with limits or as another user, and ends it at a chosen moment."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz_targets import ANSWERS
from tqdm import tqdm


# A child that is not done by then is called hung, and is killed.
HUNG_S = 120.0
_FINISHED, _ANSWERED, _INTERRUPTED, _FAILED = 0, 41, 42, 43

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Args:
        how: "finished"; "refused", by an error that answers the user; "interrupted", by KeyboardInterrupt; "killed",
            by a signal; "failed", by any other error; "hung".
        text: what was raised.
        seconds: how long it took.
    """

    how: str
    text: str
    seconds: float


def run(
    work: Callable[[], object],
    *,
    until: float | None = None,
    how: signal.Signals = signal.SIGKILL,
    prepare: Callable[[], object] = lambda: None,
) -> Ended:
    """Runs `work` in a child.

    Args:
        work: what to run.
        until: when to send the signal, in seconds from the start; None never does.
        how: the signal.
        prepare: runs in the child first: limits, another user.
    """
    reading, writing = os.pipe()
    started = time.monotonic()
    # A SIGINT that comes before the child expects it waits: it would interrupt the child's copy of pytest.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with _ONE_AT_A_TIME:  # filelock refuses a fork during a fork of another thread
        child = os.fork()
    if child == 0:
        status, text = _FAILED, ""
        try:
            os.close(reading)
            # tqdm's own lock is shared with the parent: a child that is killed while it holds it would block all.
            tqdm.set_lock(threading.RLock())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            prepare()
            work()
            status = _FINISHED
        except KeyboardInterrupt:
            status = _INTERRUPTED
        except (MemoryError, *ANSWERS) as error:
            status, text = _ANSWERED, f"{type(error).__name__}: {error}"
        except BaseException:
            text = traceback.format_exc()
        finally:
            try:
                os.write(writing, text.encode()[-4000:])
            finally:
                os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.close(writing)
    sent = until is None
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - started
        if found:
            break
        if not sent and until is not None and seconds >= until:
            os.kill(child, how)
            sent = True
        if seconds > HUNG_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return Ended("hung", "", seconds)
        time.sleep(0.0005)
    text = os.read(reading, 4000).decode(errors="replace")
    os.close(reading)
    if os.WIFSIGNALED(status):
        return Ended("killed", signal.Signals(os.WTERMSIG(status)).name, seconds)
    names = {_FINISHED: "finished", _ANSWERED: "refused", _INTERRUPTED: "interrupted"}
    return Ended(names.get(os.WEXITSTATUS(status), "failed"), text, seconds)


def become_nobody() -> None:
    """To be run in a child: another user, who owns nothing here."""
    os.environ["HOME"] = "/nonexistent"
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def readable_by_all(root: Path) -> None:
    """Lets another user read what is below `root`, and reach it; nobody but the owner may write."""
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in root.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
