"""One writer at a time: threads and processes, those that were killed, and file systems without locks."""

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from optimum_opt_trn.checkpoint import lock
from optimum_opt_trn.checkpoint.lock import one_writer


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_another_thread(tmp_path):
    errors = []

    def attempt():
        try:
            with one_writer(tmp_path / "out"):
                pass
        except BlockingIOError as error:
            errors.append(str(error))

    with one_writer(tmp_path / "out"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        with pytest.raises(BlockingIOError), one_writer(tmp_path / "out"):  # the same thread, too
            pass
    assert len(errors) == 1 and f"{tmp_path / 'out'} is being written by another process or thread: wait" in errors[0]
    attempt()
    assert len(errors) == 1 and names(tmp_path) == set(), "nothing is left over"


def test_another_process_until_it_is_killed(tmp_path):
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / ".out.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="out is being written by another"), one_writer(tmp_path / "out"):
            pass
        holder.kill()
    assert names(tmp_path) == {".out.lock"}, "a stale lock, which stops nobody"
    with one_writer(tmp_path / "out"):
        pass
    assert names(tmp_path) == set()


def test_never_two_of_many(tmp_path):
    """The lock file is removed again and again while others open it."""
    inside, most, entered = [0], [0], [0]

    def attempt():
        for _ in range(100):
            try:
                with one_writer(tmp_path / "out"):
                    inside[0] += 1
                    entered[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and entered[0] > 100


def test_the_lock_is_beside_the_directory_whatever_its_path_looks_like(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    for path in (Path("."), tmp_path / "link", Path("../out"), tmp_path / "out"):
        with one_writer(path):
            assert names(tmp_path) == {"out", "link", ".out.lock"}
            with pytest.raises(BlockingIOError), one_writer(tmp_path / "out"):
                pass
    with one_writer(tmp_path / "deep" / "er"):  # a parent is made where it is missing
        assert names(tmp_path / "deep") == {".er.lock"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with one_writer(tmp_path / "out"):
        entered = True
    assert entered


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(file, timeout):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock, "WeakFileLock", refuse)
    with one_writer(tmp_path / "out"):
        entered = True
    assert entered


def test_errors_of_the_block_are_passed_on(tmp_path):
    with pytest.raises(PermissionError, match="the block's own"), one_writer(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "the block's own")
    assert names(tmp_path) == set()
