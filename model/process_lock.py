"""A lock on a file for one process at a time: who holds it, and how to wait for it. It ends with its holder."""

import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HELD = (BlockingIOError, PermissionError, Timeout)  # what the systems raise where another process holds a lock
PATIENCE = 300  # seconds without a sign of life from the holder, after which others wait no longer
POLL = 0.2  # seconds between two attempts to acquire it


class ProcessLock:
    """The file exists while the lock is held, and names the holder.

    On Unix the lock belongs to the process (lockf), not to the open file (flock, as filelock has it): a process that
    the holder forks, and that lives longer, does not prolong it. On Windows filelock locks a file beside it, as nobody
    else can read what is locked there. On a file system without locks everybody gets it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None
        self._beside = FileLock(f"{path}.held", timeout=0)

    def acquire(self, holder: str = "") -> bool:
        """Whether no other process holds it. Raises OSError where the file cannot be written; makes its folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b", buffering=0)
        if not self._lock(file):
            file.close()
            return False
        if os.fstat(file.fileno()).st_nlink == 0:  # the last holder deleted the file after it was opened here
            file.close()
            return self.acquire(holder)
        self._file = file
        file.truncate(0)
        file.write(f"{holder}\n".encode())
        return True

    def _lock(self, file: BinaryIO) -> bool:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                self._beside.acquire()
        except HELD:
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def wait(self) -> bool:
        """Acquire it when its holder is done or dead; False if that shows no sign of life for PATIENCE seconds."""
        sign, since = None, time.monotonic()
        while not self.acquire():
            with contextlib.suppress(FileNotFoundError):  # the holder is done
                now = self.path.stat().st_mtime_ns
                if now != sign:
                    sign, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                return False
            time.sleep(POLL)
        return True

    def show_life(self) -> None:
        """A holder that others wait for calls this now and then."""
        os.utime(self.path)

    def holder(self) -> str:
        """Not for the holder itself: lockf's lock would end with the file that is opened here."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        except FileNotFoundError:  # it is done
            return "another process"

    def release(self) -> None:
        """Does nothing where the lock is not held."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # Windows deletes no file that is open
            self.path.unlink()
        self._file.close()
        self._file = None
        self._beside.release()

    def __enter__(self) -> "ProcessLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether another process holds the lock of this file. Needs no right to write; see also `holder`."""
    try:
        if not fcntl:
            with FileLock(f"{path}.held", timeout=0):
                return False
        with path.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
