"""One writer at a time: threads and processes, those that were killed, and directories that moved."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from optimum_opt_trn.checkpoint.lock import exclusive


HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_thread(tmp_path):
    errors = []

    def attempt():
        try:
            with exclusive(tmp_path / "out"):
                pass
        except BlockingIOError as error:
            errors.append(str(error))

    with exclusive(tmp_path / "out"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(errors) == 1 and f"{tmp_path / 'out'} is being written by process {os.getpid()}: wait" in errors[0]
    attempt()
    assert len(errors) == 1


def test_another_process_until_it_is_killed(tmp_path):
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"is being written by process {holder.pid}:"), exclusive(tmp_path):
            pass
        holder.kill()
    with exclusive(tmp_path):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left over"


def test_a_directory_that_moves_away(tmp_path):
    with exclusive(tmp_path / "staging"):
        (tmp_path / "staging").rename(tmp_path / "output")
        with exclusive(tmp_path / "staging"):  # a new one
            assert (tmp_path / "staging").is_dir()
        with pytest.raises(BlockingIOError, match="output is being written"), exclusive(tmp_path / "output"):
            pass


def test_the_lock_of_a_directory_that_moved_meanwhile_does_not_count(tmp_path, monkeypatch):
    flock, staging = fcntl.flock, tmp_path / "staging"

    def slow(descriptor, how):
        if not (tmp_path / "output").exists():
            staging.rename(tmp_path / "output")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with exclusive(staging):
        assert staging.is_dir()
        with exclusive(tmp_path / "output"):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_without_the_systems_word_on_who_it_is(tmp_path, monkeypatch):
    def unreadable(self, *arguments, **options):
        raise PermissionError(self)

    with exclusive(tmp_path):
        monkeypatch.setattr("pathlib.Path.read_text", unreadable)
        with pytest.raises(BlockingIOError, match="is being written by another process"), exclusive(tmp_path):
            pass
