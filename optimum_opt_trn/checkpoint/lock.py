"""The lock that keeps two writers from one output directory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock


# How long to try for a lock. WeakFileLock tries several times in this time; with 0 it would not try at all.
_LOCK_SECONDS = 0.2
# The errors of file systems without locks, and of a parent directory that cannot be written.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Keeps other threads and processes from writing `directory`, by a lock file next to it.

    The lock ends with its process, even if that is killed. There is no lock where the file system has none, or where
    the parent directory cannot be written.

    Raises:
        BlockingIOError: at once, if another one is writing it.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_name(f".{directory.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(file, timeout=_LOCK_SECONDS))
            # Removed while it is locked: another writer that had opened it notices, and creates a new one.
            held.callback(file.unlink, missing_ok=True)
        except Timeout:
            raise BlockingIOError(
                f"{directory} is being written by another process or thread: wait for it to end, or choose another "
                "directory."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
