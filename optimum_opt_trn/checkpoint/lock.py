"""One writer at a time: an advisory lock on the directory that is written, which ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# What a file system without such locks answers; there, two writers are the user's affair.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds `directory`, which is made if need be, against other writers, processes or threads.

    Raises:
        BlockingIOError: if another one holds it; the message names its process where the system tells.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, directory)
            # The holder before may have moved the directory away meanwhile.
            if _same(descriptor, directory):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.fstat(descriptor).st_ino)
        raise BlockingIOError(
            f"{directory} is being written by {holder}: wait for it to end, or choose another directory."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _same(descriptor: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), directory.stat())
    except FileNotFoundError:
        return False


def _holder(inode: int) -> str:
    """Who holds a lock on the file of this inode, as Linux tells."""
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:123456 0 EOF
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields and fields[-3].rpartition(":")[2] == str(inode):
                return f"process {fields[-4]}" if fields[-4].isdigit() and fields[-4] != "0" else "another process"
    except (OSError, IndexError):
        pass
    return "another process"
