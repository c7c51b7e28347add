"""Parquet of any schema: rows in any order, out of a copy that is mapped into memory."""

import functools
import mmap
from collections.abc import Callable
from pathlib import Path

import pyarrow

from dataset.formats import EMBEDDED_PICTURES, NESTED_FIELDS
from dataset.options import ReadOptions
from dataset.readers.parquet_copy import BYTES, DAMAGE, PICTURES, SHOWS, arrow_copy
from dataset.readers.pictures import Pictures
from dataset.readers.reader import Reader
from dataset.samples import BadSample, check_number, parse

EXTRA = "extra"  # column of scripts/prepare_data.py: JSON of the fields that have no column of their own

KEPT_MAPPED = 100  # rows that are read before their pages are given back, 64 KB or more each


class ParquetRows(Reader):
    """Rows of a parquet, through its Arrow copy (dataset.readers.parquet_copy).

    Parquet can only be read from the start of a row group on; training asks for rows in any order. The copy is written
    once, and all ranks and workers map the same file instead of loading it.
    """

    stored_as = "a parquet"

    def __init__(self, path: Path, options: ReadOptions, pictures: Pictures, copies: Path, say: Callable):
        """copies: the folder for the copy where it cannot lie beside the parquet."""
        super().__init__(path, options, pictures)
        self.copy = arrow_copy(path, options.max_samples, copies, say)
        self._read = 0  # rows, since pages were given back

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        with self.copy.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _give_back_pages(self) -> None:
        """Until then what was read counts as memory of this process: in the end the whole file."""
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    @functools.cached_property
    def columns(self) -> dict[str, pyarrow.ChunkedArray]:
        """The copy's columns; PICTURES is flattened, so that a picture's number is its index."""
        table = pyarrow.ipc.open_file(pyarrow.py_buffer(self._map)).read_all()
        self._give_back_pages()
        columns = dict(zip(table.column_names, table.columns, strict=True))
        pictures = [chunk.values for chunk in columns[PICTURES].chunks]
        return columns | {PICTURES: pyarrow.chunked_array(pictures, BYTES)}

    def __getstate__(self) -> dict:
        """For a process that is not forked: it maps the file itself."""
        return {name: value for name, value in vars(self).items() if name not in ("columns", "_map")}

    def __len__(self) -> int:
        return len(self.columns[DAMAGE])

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def facts(self) -> list:
        """The copy's name holds size and time of change."""
        return [self.copy.name]

    def record(self, index: int) -> dict:
        where, record = self.where(index), {}
        self._read += 1
        if self._read > KEPT_MAPPED:
            self._give_back_pages()
        for name, column in self.columns.items():
            if name in (PICTURES, SHOWS, DAMAGE):
                continue
            try:
                value = column[index].as_py()
            except UnicodeDecodeError as error:
                raise BadSample(where, f"{name!r} is no UTF-8 ({error}): mend or delete the row") from error
            if value is not None:  # other records of the file may have the field
                record[name] = value
        if reason := self.columns[DAMAGE][index].as_py():
            raise BadSample(where, reason)
        for name in NESTED_FIELDS:
            if isinstance(record.get(name), str):
                try:
                    record[name] = parse(record[name])
                except (ValueError, RecursionError) as error:
                    raise BadSample(where, f"{name!r} is no JSON ({str(error)[:120]})") from error
        record = {**_fields(record.pop(EXTRA, None)), **record}
        numbers = self.columns[SHOWS][index].as_py()
        check_number(where, numbers)
        if numbers:
            record[EMBEDDED_PICTURES] = [self.columns[PICTURES][number].as_py() for number in numbers]
        return record


def _fields(extra: object) -> dict:
    """What scripts/prepare_data.py keeps in a column of this name; another's stays what it is."""
    try:
        fields = parse(extra) if isinstance(extra, str) else None
    except (ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {} if extra is None else {EXTRA: extra}
