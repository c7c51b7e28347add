"""What checking and rendering a data file gave, kept on disk: a second start of a run reads instead of rendering.

One file a data set, `<key>.tokens`, named by a hash of all that decides what stands in it: the code that renders, the
tokenizer, --max_seq_len, the data. Its columns are mapped into memory, which ranks and reading processes share.
Written aside, fsynced, renamed, with a sha256 of everything at its end: what is damaged is found, and made again.
Pictures have no part in the name; their sizes and times of change are compared instead, whenever the file is used, and
what was left out for a reason outside of the data file is looked at again: rights and disks are mended without a trace.

length of the header (8 bytes), header (JSON: name, type and shape of each column), columns, sha256 (32 bytes)
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import PIL
import tokenizers
import transformers

from dataset.formats import BadSample, DataError, Sample
from model.files import sync_to_disk
from model.process_lock import ProcessLock
from model.processing import VLMProcessor

WORTH_KEEPING = 200  # samples; fewer are rendered sooner than a file is made safe
# what decides how a sample is read, checked and rendered
CODE = ("model/config.py", "model/processing.py", "dataset/formats.py", "dataset/limits.py",
        "dataset/parquet_rows.py", "dataset/parquet_copy.py", "dataset/batching.py", "dataset/vlm_dataset.py",
        "dataset/token_cache.py")  # fmt: skip
ALIGNED = 64  # bytes, where each column begins
DIGEST = 32  # bytes
FULLEST = 0.5  # of the free disk space: checkpoints need theirs
ABSENT, EMBEDDED = (-1, -1), (-2, -2)  # stamps of pictures that are no files
BAD, DROPPED = "bad", "dropped"
LINE, HEADER, WHOLE = "line", "header", "whole"  # what is looked at again: a line, its pictures by header, or whole


@dataclass
class Note:
    """Why a sample was left out; again: LINE, HEADER, WHOLE where it may be another at the next start, else empty."""

    kind: str
    number: int
    where: str
    reason: str
    again: str = ""


@dataclass
class Checked:
    """All that is known of a data file once it has been looked at, whatever share of bad samples a run allows."""

    ids: np.ndarray  # uint16 [tokens], one entry a picture; the rows one after the other
    trained: np.ndarray  # bool [tokens]
    branch: np.ndarray  # uint16 [tokens]
    offsets: np.ndarray  # int64 [rows + 1], where each row begins
    kept: np.ndarray  # int64 [rows], the sample that the row's pictures come from
    shown: np.ndarray  # int64 [pictures of all rows], their numbers, as `names` and `stamps` count them
    starts: np.ndarray  # int64 [rows + 1], where each row's begin in `shown`
    counts: np.ndarray  # int64 [samples that can be used, 2]: trained tokens, pictures
    names: np.ndarray  # uint8: of each picture that was looked at its path, or the sha256 of its bytes; then a zero
    ends: np.ndarray  # int64 [pictures that were looked at], where the zero of each stands in `names`
    stamps: np.ndarray  # int64 [pictures that were looked at, 2]: bytes and time of change; ABSENT, EMBEDDED
    notes: np.ndarray  # uint8: JSON, the fields of a Note each

    mapped = None  # no column: (path, sha256) of the file that the columns are mapped from

    def __getstate__(self) -> dict:
        """To a process that is not forked: the file, for it to map, as long as it is the one that was read."""
        if self.mapped:
            with contextlib.suppress(OSError, ValueError):
                if _load(self.mapped[0], thorough=False).mapped == self.mapped:
                    return {"mapped": self.mapped}
        return vars(self)

    def __setstate__(self, state: dict) -> None:
        """Raises DataError where the file has been made anew in between."""
        if "ids" not in state:
            found = _load(state["mapped"][0], thorough=False)
            if found.mapped != state["mapped"]:
                raise DataError(f"{found.mapped[0]} has been made anew by another run: start this one again")
            state = vars(found)
        self.__dict__.update(state)

    def shown_in(self, row: int) -> np.ndarray:
        """The numbers of a row's pictures."""
        return self.shown[self.starts[row] : self.starts[row + 1]]

    def name(self, number: int) -> str:
        """A picture's path, or the sha256 of its bytes."""
        start = int(self.ends[number - 1]) + 1 if number else 0
        return os.fsdecode(self.names[start : self.ends[number]].tobytes())

    def is_embedded(self, number: int) -> bool:
        return tuple(self.stamps[number].tolist()) == EMBEDDED

    def each_name(self) -> list[bytes]:
        return self.names.tobytes().split(b"\0")[:-1]

    def each_note(self) -> Iterator[Note]:
        return (Note(*values) for values in json.loads(self.notes.tobytes()))


class PicturesSeen:
    """Distinct pictures, numbered as they come; of their bytes only a hash is kept."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.stamps: list[tuple[int, int]] = []

    def number(self, picture: Path | bytes) -> int:
        embedded = isinstance(picture, bytes)
        name = hashlib.sha256(picture).hexdigest() if embedded else str(picture)
        if name not in self.numbers:
            self.numbers[name] = len(self.numbers)
            self.stamps.append(EMBEDDED if embedded else _stamp(name))
        return self.numbers[name]

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`names`, `ends` and `stamps` of Checked."""
        names = np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in self.numbers), np.uint8)
        return names, np.flatnonzero(names == 0), np.array(self.stamps, np.int64).reshape(-1, 2)


def _stamp(name: str | bytes) -> tuple[int, int]:
    try:
        facts = os.stat(name)
    except OSError:
        return ABSENT
    return facts.st_size, facts.st_mtime_ns


def cache_path(folder: Path, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int) -> Path:
    """Where a data file's tokens are kept; samples: as dataset.formats.read_samples opens it."""
    root = Path(__file__).parent.parent
    code = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in CODE]
    versions = [transformers.__version__, tokenizers.__version__, PIL.__version__]
    facts = [code, versions, processor.fingerprint(), max_seq_len, samples.identity()]
    return folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]}.tokens"


def read_or_render(
    path: Path, samples: Sequence[Sample], render: Callable[[Callable], Checked], say: Callable = print
) -> tuple[Checked, bool]:
    """What is kept under `path`, or what `render` gives, which is kept then; and whether it was read.

    render: called with a function that it calls now and then, to show that it lives. Where processes start side by
    side, one renders and the others wait. A folder that cannot be written is told, and everything goes on without it.
    """
    found = _read(path, samples, say)
    if found is not None:
        return found, True
    lock = ProcessLock(path.with_suffix(".lock"))
    try:
        taken = lock.take()
    except OSError as error:
        _say_not_kept(path, error, say)
        return render(lambda: None), False
    with lock:
        if not taken:
            say(f"another process renders the same data: waiting for {path}")
            lock.wait()
            lock.release()  # so that all who have waited read at once
            found = _read(path, samples, say)
            return (found, True) if found is not None else (render(lambda: None), False)
        found = _read(path, samples, lambda _: None)  # of whoever held the lock a moment ago
        if found is not None:
            return found, True
        found = render(lock.show_life)
        try:
            _write(path, found)
            found = _load(path, thorough=False)
        except OSError as error:
            _say_not_kept(path, error, say)
        return found, False


def _say_not_kept(path: Path, error: OSError, say: Callable) -> None:
    say(f"the rendered tokens cannot be kept in {path.parent} ({error.strerror}): the next start renders them again")


# ---- the file


def _read(path: Path, samples: Sequence[Sample], say: Callable) -> Checked | None:
    """What is kept there, None where there is nothing, it is damaged, or pictures have changed since."""
    try:
        found = _load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        say(f"the tokens kept in {path} cannot be used ({error}): rendering them again")
        return None
    change = _change(found, samples)
    if change:
        say(f"the tokens kept in {path} are out of date ({change}): rendering them again")
        return None
    return found


def _change(found: Checked, samples: Sequence[Sample]) -> str | None:
    """What would be found otherwise today: a picture, or a reason to leave a sample out."""
    for name, stamp in zip(found.each_name(), found.stamps.tolist(), strict=True):
        if tuple(stamp) != EMBEDDED and _stamp(name) != tuple(stamp):
            return f"{os.fsdecode(name)} has changed"
    for note in found.each_note():
        if note.again:
            try:
                sample = samples[note.number]
                if note.again != LINE:
                    sample.open_pictures(decode=note.again == WHOLE)
            except BadSample as error:
                if error.reason == note.reason:
                    continue
            return f"{note.where} has changed"
    return None


def _load(path: Path, thorough: bool = True) -> Checked:
    """Columns mapped into memory. Raises OSError, ValueError saying what is wrong; not thorough: by its size."""
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    if thorough and hashlib.sha256(raw[:-DIGEST]).digest() != raw[-DIGEST:].tobytes():
        raise ValueError("it differs from its sha256")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    columns, start = {}, 8 + size
    for name, kind, shape in json.loads(raw[8 : 8 + size].tobytes()):
        start += -start % ALIGNED
        end = start + int(np.prod(shape)) * np.dtype(kind).itemsize
        columns[name], start = raw[start:end].view(kind).reshape(shape), end
    if start + DIGEST != len(raw):
        raise ValueError(f"it has {len(raw)} bytes instead of {start + DIGEST}")
    found = Checked(**columns)
    found.mapped = path, raw[-DIGEST:].tobytes()
    return found


def _write(path: Path, found: Checked) -> None:
    """Aside, fsynced, renamed. Raises OSError, with nothing left behind."""
    for litter in path.parent.glob(f".{path.stem}.*.tmp"):  # of a process that was killed; we hold the lock
        litter.unlink(missing_ok=True)
    columns = {column.name: getattr(found, column.name) for column in fields(Checked)}
    if sum(column.nbytes for column in columns.values()) > FULLEST * shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    header = json.dumps([[name, str(column.dtype), column.shape] for name, column in columns.items()]).encode()
    aside, digest = path.with_name(f".{path.stem}.{os.getpid()}.tmp"), hashlib.sha256()
    try:
        with aside.open("wb") as file:
            for piece in (len(header).to_bytes(8, "little") + header, *columns.values()):
                content = (
                    np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece.reshape(-1).view(np.uint8)
                )
                for part in (bytes(-file.tell() % ALIGNED), content):
                    file.write(part)
                    digest.update(part)
            file.write(digest.digest())
        sync_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_to_disk(path.parent)
