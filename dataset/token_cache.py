"""What the check of a data file gave, kept on disk: a second start of a run reads instead of rendering.

One file a data set, `<key>.tokens`, named by a hash of all that decides what stands in it: FORMAT, the tokenizer,
--max_seq_len, the data. Its columns are mapped into memory, which ranks and reading processes share.
Written aside, fsynced, renamed, with a sha256 of everything at its end: what is damaged is found, and made again.
Pictures have no part in the name; their sizes and times of change are compared instead, whenever the file is used, and
what was rejected for a reason outside of the data file is looked at again: rights and disks are mended without a trace.

length of the header (8 bytes), header (JSON: name, type and shape of each column), columns, sha256 (32 bytes)
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import tokenizers
import transformers

from dataset.check import CheckedData
from dataset.samples import DataError, Sample
from model.files import written_aside
from model.process_lock import ProcessLock
from model.processing import VLMProcessor

FORMAT = 3  # of what is kept; raise it with any change of how samples are read, checked and rendered
WORTH_KEEPING = 200  # samples; fewer are rendered sooner than a file is made safe
ALIGNED = 64  # bytes, where each column begins
DIGEST = 32  # bytes
AT_ONCE = 1 << 20  # bytes read together
FULLEST = 0.5  # of the free disk space: checkpoints need theirs


class MappedData(CheckedData):
    """Columns that are mapped from a file. To a process that is not forked the file is sent, for it to map."""

    path: Path
    digest: bytes

    def __reduce__(self) -> tuple:
        with contextlib.suppress(OSError, ValueError):
            if _map(self.path).digest == self.digest:
                return _map_again, (self.path, self.digest)
        return CheckedData, tuple(getattr(self, column.name) for column in fields(self))


def _map_again(path: Path, digest: bytes) -> MappedData:
    """Raises DataError where the file has been made anew in between."""
    mapped = _map(path)
    if mapped.digest != digest:
        raise DataError(f"{path} has been made anew by another run: start this one again")
    return mapped


class TokenCache:
    """Where the check of one data file is kept."""

    def __init__(self, folder: Path, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int):
        """samples: as dataset.formats.read_samples opens them."""
        versions = [transformers.__version__, tokenizers.__version__, PIL.__version__]
        facts = [FORMAT, versions, processor.fingerprint(), max_seq_len, samples.identity()]
        self.path = folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]}.tokens"
        self.samples = samples
        self.lock = ProcessLock(self.path.with_suffix(".lock"))
        self.may_store = False

    def load(self, say: Callable = lambda _: None) -> CheckedData | None:
        """None where there is nothing, it is damaged, or pictures have changed since."""
        try:
            mapped = _map(self.path, verify=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            say(f"the tokens kept in {self.path} cannot be used ({error}): rendering them again")
            return None
        if change := mapped.change(self.samples):
            say(f"the tokens kept in {self.path} are out of date ({change}): rendering them again")
            return None
        return mapped

    @contextlib.contextmanager
    def turn(self, say: Callable) -> Iterator[Callable]:
        """Where processes start side by side one checks the data, the others wait for it; gives what shows its life."""
        with self.lock:
            try:
                self.may_store = self.lock.acquire()
                if not self.may_store:
                    say(f"another process renders the same data: waiting for {self.path}")
                    self.may_store = self.lock.wait()
            except OSError as error:
                self._say_not_kept(error, say)
            yield self.lock.show_life if self.may_store else lambda: None

    def store(self, checked: CheckedData, say: Callable) -> CheckedData:
        """The same, mapped from the file where it can be kept."""
        if self.may_store:
            try:
                _write(self.path, checked)
                return _map(self.path)
            except OSError as error:
                self._say_not_kept(error, say)
        return checked

    def _say_not_kept(self, error: OSError, say: Callable) -> None:
        folder, reason = self.path.parent, error.strerror
        say(f"the rendered tokens cannot be kept in {folder} ({reason}): the next start renders them again")


# ---- the file


def _map(path: Path, verify: bool = False) -> MappedData:
    """verify: compare the sha256, too, and not the size alone. Raises OSError, ValueError saying what is wrong."""
    with path.open("rb") as file:
        raw = np.memmap(file, np.uint8, "r").view(np.ndarray)
        digest = raw[-DIGEST:].tobytes()
        if verify and _sha256(file, len(raw) - DIGEST) != digest:
            raise ValueError("it differs from its sha256")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    columns, start = {}, 8 + size
    for name, kind, shape in json.loads(raw[8 : 8 + size].tobytes()):
        start += -start % ALIGNED
        end = start + int(np.prod(shape)) * np.dtype(kind).itemsize
        columns[name], start = raw[start:end].view(kind).reshape(shape), end
    if start + DIGEST != len(raw):
        raise ValueError(f"it has {len(raw)} bytes instead of {start + DIGEST}")
    mapped = MappedData(**columns)
    mapped.path, mapped.digest = path, digest
    return mapped


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Of the first bytes of a file, read: of a map every page would count as this process's memory from then on."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (part := file.read(min(size, AT_ONCE))):
        digest.update(part)
        size -= len(part)
    return digest.digest()


def _write(path: Path, checked: CheckedData) -> None:
    """Raises OSError, with nothing left behind."""
    for litter in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed; we hold the lock
        litter.unlink(missing_ok=True)
    columns = {column.name: getattr(checked, column.name) for column in fields(checked)}
    if sum(column.nbytes for column in columns.values()) > FULLEST * shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    header = json.dumps([[name, str(column.dtype), column.shape] for name, column in columns.items()]).encode()
    header = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256()
    with written_aside(path) as aside, aside.open("wb") as file:
        for piece in (header, *(column.reshape(-1).view(np.uint8) for column in columns.values())):
            for part in (bytes(-file.tell() % ALIGNED), piece):
                file.write(part)
                digest.update(part)
        file.write(digest.digest())
