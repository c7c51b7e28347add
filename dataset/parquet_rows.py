"""MiniMind's parquet: rows in any order, out of an Arrow copy that is mapped into memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from dataset.formats import BadSample, DataError, Sample, check_number, make_sample, parse, shown
from model.text import plain

MAX_GROUP = 10**8  # rows of a parquet's row group; a damaged file may claim any number


class ParquetRows(Sequence):
    """Rows of a parquet, through an uncompressed Arrow copy beside it that is mapped into memory.

    Parquet can only be read a row group at a time, in whole; training asks for rows in any order. The copy is written
    once, a row group at a time, and shared by all ranks and workers without taking their memory. The rows of a group
    that cannot be read stand in it empty, with the reason in DAMAGE, so that all others keep their numbers.
    """

    COLUMNS, DAMAGE = ("conversations", "image_bytes"), "damage"

    def __init__(self, path: Path):
        self.path = path
        self.arrow = path.with_name(f"{path.name}.{path.stat().st_size}-{path.stat().st_mtime_ns}.rows.arrow")
        if not self.arrow.is_file():
            self._copy()
        self._table = None
        self._rows = self._open().num_rows

    def _copy(self) -> None:
        temporary = self.arrow.with_name(f".{self.arrow.name}.{os.getpid()}.tmp")
        try:
            file = parquet.ParquetFile(self.path, memory_map=True, page_checksum_verification=True)
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            if sum(groups) != file.metadata.num_rows or any(not 0 <= rows <= MAX_GROUP for rows in groups):
                raise ValueError(f"row groups of {shown(groups)} rows, together {file.metadata.num_rows}")
            absent = set(self.COLUMNS) - set(file.schema_arrow.names)
            if absent:
                raise DataError(f"{self.path}: column {absent.pop()!r} is missing; it has {file.schema_arrow.names}")
            fields = [file.schema_arrow.field(name).with_nullable(True) for name in self.COLUMNS]
            schema = pyarrow.schema([*fields, pyarrow.field(self.DAMAGE, pyarrow.string())])
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
                for group in range(file.num_row_groups):
                    writer.write_table(self._group(file, group, schema))
            os.replace(temporary, self.arrow)
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: cannot be read as parquet ({plain(str(error)[:200])}): download it again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _group(self, file, number: int, schema):
        """A row group as a table of the schema; where it is damaged, as empty rows that say so."""
        rows, kinds = file.metadata.row_group(number).num_rows, schema.types
        try:
            table = file.read_row_group(number, columns=list(self.COLUMNS)).select(self.COLUMNS)
            if table.num_rows != rows:
                raise ValueError(f"it has {table.num_rows} rows instead of {rows}")
            table.validate()
            return table.append_column(self.DAMAGE, pyarrow.nulls(rows, pyarrow.string())).cast(schema)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = f"row group {number} cannot be read ({str(error)[:160]}): download the file again"
            empty = [pyarrow.nulls(rows, kind) for kind in kinds[:-1]]
            return pyarrow.table([*empty, pyarrow.array([reason] * rows, kinds[-1])], schema)

    def _open(self):
        if self._table is None:
            self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.arrow))).read_all()
        return self._table

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_table": None}  # each worker maps the file itself

    def __len__(self) -> int:
        return self._rows

    def identity(self) -> list:
        """What tells this data from other data, pictures and all: the file's size and time of change."""
        facts = self.path.stat()
        return [str(self.path), facts.st_size, facts.st_mtime_ns]

    def __getitem__(self, index: int) -> Sample:
        where = f"{self.path}:{index + 1}"
        try:
            row = {name: self._open()[name][index].as_py() for name in (*self.COLUMNS, self.DAMAGE)}
        except UnicodeDecodeError as error:
            raise BadSample(where, f"'conversations' is no UTF-8 ({error}): mend or delete the row") from error
        if row[self.DAMAGE]:
            raise BadSample(where, row[self.DAMAGE])
        conversations = row["conversations"]
        try:
            if isinstance(conversations, str):
                conversations = parse(conversations)
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"'conversations' is no JSON ({str(error)[:120]})") from error
        pictures = row["image_bytes"] if isinstance(row["image_bytes"], list) else [row["image_bytes"]]
        pictures = [picture for picture in pictures if picture]
        if not all(isinstance(picture, bytes) for picture in pictures):
            kinds = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
            raise BadSample(where, f"'image_bytes' must be bytes or a list of them, it is {kinds}")
        check_number(where, pictures)
        return make_sample(where, {"conversations": conversations}, pictures)
