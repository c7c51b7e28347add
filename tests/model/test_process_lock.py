"""Locks between processes: who gets one, when it ends, what waiting comes to. Windows: tests/test_other_systems.py."""

import errno
import os
import signal
import time
from types import SimpleNamespace

import pytest

from helpers.faults import held_by_another, in_child, start_child
from model import process_lock
from model.process_lock import ProcessLock, is_held


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "lock"


def test_a_lock_ends_with_its_holder_although_a_process_that_it_forked_lives_on(path, tmp_path):
    def hold_and_fork():
        lock = ProcessLock(path)
        assert lock.acquire("the holder")
        if os.fork():
            time.sleep(600)
        (tmp_path / "reader").write_text(str(os.getpid()))
        time.sleep(600)

    holder = start_child(hold_and_fork, tmp_path / "log")
    while not (tmp_path / "reader").exists() or not (tmp_path / "reader").read_text():
        time.sleep(0.01)
    lock = ProcessLock(path)
    assert is_held(path) and not lock.acquire() and lock.holder() == "the holder"
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        assert not is_held(path) and lock.acquire("the next")
    finally:
        os.kill(int((tmp_path / "reader").read_text()), signal.SIGKILL)
    assert lock.path.read_text() == "the next\n"
    lock.release()
    assert not path.exists() and not is_held(path)


def test_a_lock_file_that_is_deleted_after_it_was_opened_is_not_the_lock(path, monkeypatch):
    """Its holder deletes it at the end: who had opened it before would hold what nobody else can see."""
    lock = ProcessLock(path)
    lock_file, opened = lock._lock, []

    def deleted_at_first(file) -> bool:
        if not opened:
            path.unlink()
        opened.append(file)
        return lock_file(file)

    monkeypatch.setattr(lock, "_lock", deleted_at_first)
    assert lock.acquire() and len(opened) == 2 and path.exists()
    assert in_child(lambda: ProcessLock(path).acquire() and os._exit(3), path.with_name("log")) == 0


def test_a_file_system_without_locks_gives_everybody_the_lock(path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(process_lock, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4, LOCK_SH=1))
    assert ProcessLock(path).acquire() and ProcessLock(path).acquire()


def test_who_waits_gets_the_lock_of_a_holder_that_dies(path, tmp_path):
    with held_by_another(path):
        waiter = start_child(lambda: ProcessLock(path).wait() or os._exit(3), tmp_path / "log")
        time.sleep(0.5)
        assert os.waitpid(waiter, os.WNOHANG) == (0, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]) == 0


def test_a_holder_that_shows_life_is_waited_for(path, tmp_path, monkeypatch):
    monkeypatch.setattr(process_lock, "PATIENCE", 0.5)

    def hold():
        lock = ProcessLock(path)
        assert lock.acquire()
        for _ in range(20):
            lock.show_life()
            time.sleep(0.1)
        lock.release()

    holder = start_child(hold, tmp_path / "log")
    while not is_held(path):
        time.sleep(0.01)
    lock, started = ProcessLock(path), time.monotonic()
    assert lock.wait() and time.monotonic() - started > 1
    lock.release()
    os.waitpid(holder, 0)
