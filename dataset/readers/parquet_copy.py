"""The Arrow copy of a parquet, whose rows can be read in any order: where it lies, who writes it, the room it needs.

It holds the columns that any format reads, as they are, and the pictures. Each of these stands in it once, however many
rows show it, and is named by its number: `pictures` holds those that a row is the first to show, `shows` the numbers of
all that it shows, in order. The rows of a row group that cannot be read are empty, with the reason in `damage`, so that
all others keep their places.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow

from dataset.readers.parquet_source import UNREADABLE, DamagedGroup, ParquetSource
from dataset.samples import DataError
from model.files import written_aside
from model.messages import NO_ROOM, plain
from model.process_lock import PATIENCE, ProcessLock

PICTURES, SHOWS, DAMAGE = "pictures", "shows", "damage"
BYTES, NUMBER = pyarrow.large_binary(), pyarrow.int64()
FORMAT = 3  # of the copy, a part of its name
# Of a copy's name: size and time of change of the parquet, how many rows where these are not all, format.
SUFFIX = re.compile(r"\.\d+-\d+(\.first-\d+)?\.rows(-\d+)?\.arrow$")
EMPTY_AT_ONCE = 1 << 14  # rows of a damaged group
BYTES_A_ROW = 32  # for picture numbers and offsets, beside the text and the pictures
FULLEST = 0.95  # of the free disk space


def arrow_copy(path: Path, rows: int, copies: Path, say: Callable) -> Path:
    """The copy beside the parquet or, where that cannot be, in the folder `copies`; written if there is none yet.

    rows: copy the first so many; 0: all. Where processes start side by side, one writes and the others wait. Raises
    DataError.
    """
    facts = path.stat()
    state = f"{facts.st_size}-{facts.st_mtime_ns}{f'.first-{rows}' if rows else ''}.rows-{FORMAT}.arrow"
    folder = hashlib.sha256(os.fsencode(path.resolve().parent)).hexdigest()[:12]
    places = path.with_name(f"{path.name}.{state}"), copies / f"{folder}-{path.name}.{state}"
    for place in places:
        if is_complete(place):
            return place
    source = ParquetSource(path)
    needed, refused = _bytes_needed(source, rows), []
    for place in places:
        try:
            return _write_or_wait(source, place, (needed, rows), say)
        except OSError as error:
            why = plain(error.strerror or str(error))
            if error.errno in NO_ROOM:
                why += f", {shutil.disk_usage(place.parent).free / 1e6:,.1f} MB are free"
            refused.append(f"{place.parent} cannot take it ({why})")
    raise DataError(
        f"{path}: a copy of it, to read rows in any order, needs about {needed / 1e6:,.1f} MB, but "
        f"{' and '.join(refused)}: make room, or give a --save_dir on a disk that has it"
    )


def is_complete(place: Path) -> bool:
    try:
        with pyarrow.memory_map(str(place)) as source:
            pyarrow.ipc.open_file(source)
    except UNREADABLE:
        return False
    return True


def _bytes_needed(source: ParquetSource, rows: int) -> int:
    """About the size of the copy: pictures as in the file, where hardly one gets smaller; texts uncompressed.

    Too much where the file holds a picture once for each row that shows it, which only reading it would tell.
    """
    needed = source.rows * BYTES_A_ROW
    for group in range(len(source.groups)):
        for name, column in source.stored(group):
            is_picture = name == source.picture_column
            needed += column.total_compressed_size if is_picture else column.total_uncompressed_size
    return needed * min(rows, source.rows) // max(1, source.rows) if rows else needed


# ---- one writes, the others wait


def _write_or_wait(source: ParquetSource, place: Path, much: tuple[int, int], say: Callable) -> Path:
    """much: bytes needed, rows to copy.

    Raises OSError where this place cannot be written or is too small, DataError where another's writer hangs.
    """
    path, (needed, rows) = source.path, much
    with ProcessLock(place.with_name(f".{place.name}.lock")) as lock:
        wait_for_turn(lock, (path, "copies", place), say)
        if not is_complete(place):
            _make_room(place, needed, say)
            say(f"{path}: copied once, to read rows in any order: {needed / 1e6:,.1f} MB in {place.parent}")
            _write(path, place, rows, lock.show_life)
    return place


def wait_for_turn(lock: ProcessLock, what: tuple[Path | str, str, Path], say: Callable) -> None:
    """Until no other process writes the same. what: of what, what is done with it, and where to.

    Raises DataError where the other hangs, OSError where nothing can be written.
    """
    source, does, place = what
    if not lock.acquire():
        say(f"another process {does} {source}: waiting for {place}")
        if not lock.wait():
            raise DataError(
                f"{source}: the process that {does} it to {place} has shown no sign of life for {PATIENCE} seconds: "
                "end it, and start again"
            )


def _make_room(place: Path, needed: int, say: Callable) -> None:
    """Delete what nothing will read again, and raise OSError where there still is too little room."""
    for litter in place.parent.glob(f".{place.name}.*.tmp"):  # of a process that was killed; we hold the lock
        litter.unlink(missing_ok=True)
    name, state = SUFFIX.sub("", place.name), _state(place.name)
    for old in place.parent.iterdir():
        if SUFFIX.search(old.name) and SUFFIX.sub("", old.name) == name and _state(old.name) != state:
            say(f"deleting {old}, a copy of what {name} was, or of a former format")
            old.unlink(missing_ok=True)
    if needed > FULLEST * shutil.disk_usage(place.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _state(name: str) -> tuple[str, str]:
    """What a copy is of, and its format: copies of fewer rows of the same file stand side by side."""
    first, *_, last = SUFFIX.search(name)[0].removesuffix(".arrow").strip(".").split(".")
    return first, last


def _write(path: Path, place: Path, rows: int, show_life: Callable[[], None]) -> None:
    """Raises OSError, with nothing left behind."""
    damaged: dict[int, str] = {}
    try:
        with written_aside(place) as aside:
            while newly_damaged := _write_once(ParquetSource(path, damaged), rows, aside, show_life):
                damaged |= newly_damaged  # some of their rows have been written: once more, without them
    finally:
        _give_back_memory()


def _write_once(source: ParquetSource, rows: int, aside: Path, show_life: Callable) -> dict[int, str]:
    """Write every row, but for those of the groups known to be damaged; returns other damaged groups, and why."""
    newly_damaged, left = {}, rows or source.rows
    schema = pyarrow.schema([
        *(pyarrow.field(name, kind) for name, kind in source.text_columns.items()),
        pyarrow.field(PICTURES, pyarrow.large_list(BYTES)),
        pyarrow.field(SHOWS, pyarrow.large_list(NUMBER)),
        pyarrow.field(DAMAGE, pyarrow.string()),
    ])  # fmt: skip
    with pyarrow.OSFile(str(aside), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        copy = CopyWriter(writer, schema)
        for group, rows_in_group in enumerate(source.groups):
            if left <= 0:
                break
            if group in source.damaged:
                copy.write_damaged(min(left, rows_in_group), source.damaged[group])
                left -= rows_in_group
                continue
            try:
                for texts, pictures in source.read(group):
                    copy.write([column[:left] for column in texts], pictures[:left])
                    left -= len(pictures)
                    _give_back_memory()
                    show_life()
                    if left <= 0:
                        break
            except DamagedGroup as error:
                newly_damaged[group] = str(error)
    return newly_damaged


def _give_back_memory() -> None:
    """Arrow's own pool would keep a multiple of what is ever used at a time."""
    pyarrow.default_memory_pool().release_unused()


class CopyWriter:
    """Writes rows of a parquet into a copy, each picture with the first row that shows it. Raises OSError."""

    def __init__(self, writer: pyarrow.ipc.RecordBatchFileWriter, schema: pyarrow.Schema):
        self.writer, self.schema = writer, schema
        self.numbers: dict[bytes, int] = {}  # of each picture, by the sha256 of its bytes

    def write(self, texts: list[pyarrow.Array], pictures: list[list[pyarrow.Buffer]]) -> None:
        """texts: the rows' columns; pictures: of each row."""
        contents, lengths = bytearray(), []  # of the pictures that are new
        new_in_row, shown_in_row, shown = [], [], []
        for row in pictures:
            known = len(self.numbers)
            for picture in row:
                digest = hashlib.sha256(picture).digest()
                if digest not in self.numbers:
                    self.numbers[digest] = len(self.numbers)
                    contents += picture
                    lengths.append(len(picture))
                shown.append(self.numbers[digest])
            new_in_row.append(len(self.numbers) - known)
            shown_in_row.append(len(row))
        buffers = [None, _offsets(lengths), pyarrow.py_buffer(contents)]
        new = pyarrow.Array.from_buffers(BYTES, len(lengths), buffers)
        numbers = pyarrow.Array.from_buffers(NUMBER, len(shown), [None, pyarrow.py_buffer(np.array(shown, np.int64))])
        damage = pyarrow.nulls(len(pictures), pyarrow.string())
        self._write([*texts, _lists(new_in_row, new), _lists(shown_in_row, numbers), damage])

    def write_damaged(self, rows: int, reason: str) -> None:
        """Empty rows with the reason, for those that cannot be read."""
        for start in range(0, rows, EMPTY_AT_ONCE):
            count = min(EMPTY_AT_ONCE, rows - start)
            empty = [pyarrow.nulls(count, field.type) for field in self.schema]
            self._write([*empty[:-1], pyarrow.repeat(reason, count)])

    def _write(self, columns: list[pyarrow.Array]) -> None:
        self.writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))


# Arrays are made from buffers, because pyarrow.array loads pandas (30 MB) to see whether it was given a part of that.


def _offsets(lengths: list[int]) -> pyarrow.Buffer:
    return pyarrow.py_buffer(np.cumsum([0, *lengths], dtype=np.int64))


def _lists(lengths: list[int], values: pyarrow.Array) -> pyarrow.Array:
    """Lists of these lengths, with `values` one after the other."""
    kind = pyarrow.large_list(values.type)
    return pyarrow.Array.from_buffers(kind, len(lengths), [None, _offsets(lengths)], children=[values])
