"""One process makes a file that several need; the others wait for it, as long as it shows that it lives."""

import os
import time
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE, POLL = 300, 0.2  # seconds: without a sign of life from whom we wait for; between two looks


def open_lock(path: Path) -> BinaryIO:
    """The file that is locked; its folder is made where there is none. Raises OSError. Who took it alone deletes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+b")


def take(lock: BinaryIO, alone: bool = True) -> bool:
    """Whether the lock could be had, alone or beside others who only wait. It ends with the process that holds it."""
    if fcntl is None:  # as on a file system without locks
        return True
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: each for itself, the rename at the end is safe
        pass
    return not alone or _still_there(lock)


def _still_there(lock: BinaryIO) -> bool:
    """False where whoever was done has deleted the file after we opened it: a third process may lock another."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def show_life(lock: BinaryIO) -> None:
    """To be called now and then while the lock is held alone."""
    os.utime(lock.name)


def wait(lock: BinaryIO) -> bool:
    """Until whoever holds the lock is done; False where it has shown no sign of life for PATIENCE seconds."""
    sign, since = None, time.monotonic()
    while not take(lock, alone=False):
        now = os.fstat(lock.fileno()).st_mtime_ns
        if now != sign:
            sign, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            return False
        time.sleep(POLL)
    return True
