"""A lock that ends with the process that took it, on Unix and on Windows."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class ProcessLock:
    """Of a file, in which the holder names itself.

    On Unix it is one of the process (lockf), not of the open file (flock, as filelock has it): processes that read data
    for the holder, forked with its open files, do not prolong it. Where there is no fcntl, filelock locks a file beside
    it, as nobody else can read what Windows locks.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._beside = FileLock(f"{path}.held", timeout=0)

    def take(self, holder: str) -> bool:
        """Whether nobody else holds it. Raises OSError where the file cannot be written."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                self._beside.acquire()
        except (OSError, Timeout):
            self.release()
            return False
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{holder}\n".encode())
        return True

    def holder(self) -> str:
        """Not for the holder itself: lockf's lock would end with the file that is opened here."""
        return self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"

    def release(self) -> None:
        os.close(self._descriptor)
        self._beside.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of this file; asked by another than the holder, see `holder`."""
    if not fcntl:
        try:
            with FileLock(f"{path}.held", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # there is no such folder
            return False
    try:
        with path.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
