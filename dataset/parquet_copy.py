"""The Arrow copy of a parquet, whose rows can be read in any order: where it lies, who writes it, the room it needs.

Each picture stands in it once, however many rows show it, and is named by its number: `pictures` holds those that a
row is the first to show, `shows` the numbers of all that it shows, in order. The rows of a row group that cannot be
read are empty, with the reason in `damage`, so that all others keep their places.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet, types

from dataset.samples import DataError, shown
from model.files import written_aside
from model.messages import NO_ROOM, plain
from model.process_lock import PATIENCE, ProcessLock

TEXTS, PICTURES = "conversations", "image_bytes"
BYTES, NUMBER = pyarrow.large_binary(), pyarrow.int64()
FORMAT = 2  # of the copy, a part of its name
SUFFIX = re.compile(r"\.\d+-\d+\.rows(-\d+)?\.arrow$")  # of a copy: size and time of change of the parquet, format
MAX_GROUP = 10**8  # rows of a row group; a damaged file may claim any number
AT_ONCE = 2 << 20  # bytes that are read together
ROWS_AT_ONCE = 128  # that are read together: all may show one picture, which is then there as often
EMPTY_AT_ONCE = 1 << 14  # rows of a damaged group
BYTES_A_ROW = 32  # for picture numbers and offsets, beside the text and the pictures
READ_BUFFER = 1 << 16  # bytes; without one pyarrow reads a whole column of a group ahead
FULLEST = 0.95  # of the free disk space
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError)  # what pyarrow raises over damage


class DamagedGroup(Exception):
    """A row group that cannot be read."""


def arrow_copy(path: Path, copies: Path, say: Callable) -> Path:
    """The copy beside the parquet or, where that cannot be, in the folder `copies`; written if there is none yet.

    Where processes start side by side, one writes and the others wait. Raises DataError.
    """
    facts = path.stat()
    state = f"{facts.st_size}-{facts.st_mtime_ns}.rows-{FORMAT}.arrow"
    folder = hashlib.sha256(os.fsencode(path.resolve().parent)).hexdigest()[:12]
    places = path.with_name(f"{path.name}.{state}"), copies / f"{folder}-{path.name}.{state}"
    for place in places:
        if is_complete(place):
            return place
    file = _open(path)
    needed, refused = _bytes_needed(file), []
    for place in places:
        try:
            return _write_or_wait(path, place, needed, say)
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


def _open(path: Path) -> parquet.ParquetFile:
    """Raises DataError where it is no parquet, or none with the columns that are needed."""
    try:
        # Without a map of the file, whose pages would count as memory, and without reading ahead.
        file = parquet.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True)
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        if sum(groups) != file.metadata.num_rows or any(not 0 <= rows <= MAX_GROUP for rows in groups):
            raise ValueError(f"row groups of {shown(groups)} rows, together {file.metadata.num_rows}")
        schema = file.schema_arrow
        for name in (TEXTS, PICTURES):
            if name not in schema.names:
                raise DataError(f"{path}: column {name!r} is missing; it has {schema.names}")
        kind = schema.field(PICTURES).type
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as parquet ({plain(str(error)[:200])}): download it again") from error
    if not _holds_bytes(kind):
        raise DataError(
            f"{path}: column {PICTURES!r} must be bytes of pictures, or lists of them, it is {plain(str(kind))}: "
            "write the file again with the pictures' files as bytes"
        )
    return file


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type is of bytes, or of lists of them."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    kinds_of_bytes = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_null
    return any(is_kind(_decoded(kind)) for is_kind in kinds_of_bytes)


def _decoded(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type without dictionary encoding."""
    return kind.value_type if types.is_dictionary(kind) else kind


def _bytes_needed(file: parquet.ParquetFile) -> int:
    """About the size of the copy: pictures as in the file, where hardly one gets smaller; texts uncompressed.

    Too much where the file holds a picture once for each row that shows it, which only reading it would tell.
    """
    needed = file.metadata.num_rows * BYTES_A_ROW
    for group in range(file.num_row_groups):
        for name, column in _columns_of(file, group):
            needed += column.total_uncompressed_size if name == TEXTS else column.total_compressed_size
    return needed


def _columns_of(file: parquet.ParquetFile, group: int) -> list[tuple[str, parquet.ColumnChunkMetaData]]:
    """What is stored of the two columns; their names are the schema's, a damaged group may know them by others."""
    names = [file.schema.column(number).path.split(".")[0] for number in range(len(file.schema))]
    facts = file.metadata.row_group(group)
    return [(name, facts.column(number)) for number, name in enumerate(names) if name in (TEXTS, PICTURES)]


# ---- one writes, the others wait


def _write_or_wait(path: Path, place: Path, needed: int, say: Callable) -> Path:
    """Raises OSError where this place cannot be written or is too small, DataError where another's writer hangs."""
    with ProcessLock(place.with_name(f".{place.name}.lock")) as lock:
        if not lock.acquire():
            say(f"another process copies {path}: waiting for {place}")
            if not lock.wait():
                raise DataError(
                    f"{path}: the process that copies it to {place} has shown no sign of life for {PATIENCE} "
                    "seconds: end it, and start again"
                )
        if not is_complete(place):
            _make_room(place, needed, say)
            say(f"{path}: copied once, to read rows in any order: {needed / 1e6:,.1f} MB in {place.parent}")
            _write(path, place, lock.show_life)
    return place


def _make_room(place: Path, needed: int, say: Callable) -> None:
    """Delete what nothing will read again, and raise OSError where there still is too little room."""
    for litter in place.parent.glob(f".{place.name}.*.tmp"):  # of a process that was killed; we hold the lock
        litter.unlink(missing_ok=True)
    name = SUFFIX.sub("", place.name)
    for old in place.parent.iterdir():
        if SUFFIX.search(old.name) and SUFFIX.sub("", old.name) == name and old != place:
            say(f"deleting {old}, a copy of what {name} was, or of a former format")
            old.unlink(missing_ok=True)
    if needed > FULLEST * shutil.disk_usage(place.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write(path: Path, place: Path, show_life: Callable[[], None]) -> None:
    """Raises OSError, with nothing left behind."""
    damaged: dict[int, str] = {}
    try:
        with written_aside(place) as aside:
            while newly_damaged := _write_once(_open(path), aside, damaged, show_life):
                damaged |= newly_damaged  # some of their rows have been written: once more, without them
    finally:
        _give_back_memory()


def _write_once(file: parquet.ParquetFile, aside: Path, damaged: dict[int, str], show_life: Callable) -> dict[int, str]:
    """Write every row, but for those of the groups known to be damaged; returns other damaged groups, and why."""
    newly_damaged = {}
    schema = pyarrow.schema([
        pyarrow.field(TEXTS, _decoded(file.schema_arrow.field(TEXTS).type)),
        pyarrow.field("pictures", pyarrow.large_list(BYTES)),
        pyarrow.field("shows", pyarrow.large_list(NUMBER)),
        pyarrow.field("damage", pyarrow.string()),
    ])  # fmt: skip
    with pyarrow.OSFile(str(aside), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        copy = CopyWriter(writer, schema)
        for group in range(file.num_row_groups):
            if group in damaged:
                copy.write_damaged(file.metadata.row_group(group).num_rows, damaged[group])
                continue
            try:
                for texts, pictures in _read(file, group):
                    copy.write(texts, pictures)
                    _give_back_memory()
                    show_life()
            except DamagedGroup as error:
                newly_damaged[group] = str(error)
    return newly_damaged


def _read(file: parquet.ParquetFile, group: int) -> Iterator[tuple[pyarrow.Array, list[list[pyarrow.Buffer]]]]:
    """Texts and pictures of the rows of a group, some rows at a time. Raises DamagedGroup, maybe after the first."""
    rows, rows_read = file.metadata.row_group(group).num_rows, 0
    size = sum(column.total_uncompressed_size for _, column in _columns_of(file, group))
    step = max(1, min(ROWS_AT_ONCE, AT_ONCE * rows // max(1, size)))
    is_dictionary = any(types.is_dictionary(file.schema_arrow.field(name).type) for name in (TEXTS, PICTURES))
    together = max(1, rows) if is_dictionary else step  # each batch holds the dictionary of all
    try:
        for batch in file.iter_batches(together, [group], [TEXTS, PICTURES], use_threads=False):
            batch.validate()
            rows_read += batch.num_rows
            if rows_read > rows:
                raise ValueError(f"it has more than {rows} rows")
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                texts = part.column(TEXTS)
                yield texts.cast(_decoded(texts.type)), _pictures(part.column(PICTURES))
        if rows_read != rows:
            raise ValueError(f"it has {rows_read} rows instead of {rows}")
    except UNREADABLE as error:
        reason = f"row group {group} cannot be read ({str(error)[:160]}): download the file again"
        raise DamagedGroup(reason) from error


def _pictures(column: pyarrow.Array) -> list[list[pyarrow.Buffer]]:
    """The bytes of the pictures of each row, empty ones left out."""
    rows = ((cell.values or ()) if isinstance(cell, pyarrow.ListScalar) else (cell,) for cell in column)
    return [[content for cell in row if (content := _content(cell))] for row in rows]


def _content(cell: pyarrow.Scalar) -> pyarrow.Buffer | None:
    cell = cell.value if isinstance(cell, pyarrow.DictionaryScalar) and cell.is_valid else cell
    return cell.as_buffer() if cell.is_valid else None


def _give_back_memory() -> None:
    """Arrow's own pool would keep a multiple of what is ever used at a time."""
    pyarrow.default_memory_pool().release_unused()


class CopyWriter:
    """Writes rows of a parquet into a copy, each picture with the first row that shows it. Raises OSError."""

    def __init__(self, writer: pyarrow.ipc.RecordBatchFileWriter, schema: pyarrow.Schema):
        self.writer, self.schema = writer, schema
        self.numbers: dict[bytes, int] = {}  # of each picture, by the sha256 of its bytes

    def write(self, texts: pyarrow.Array, pictures: list[list[pyarrow.Buffer]]) -> None:
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
        damage = pyarrow.nulls(len(texts), pyarrow.string())
        self._write([texts, _lists(new_in_row, new), _lists(shown_in_row, numbers), damage])

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
