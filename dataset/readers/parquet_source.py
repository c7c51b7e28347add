"""A parquet of any schema as it is read: which of its columns tell something, and its row groups, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet, types

from dataset.formats import EMBEDDED_PICTURES, PICTURE_FIELDS, RATINGS, TEXT_FIELDS, check_columns
from dataset.samples import DataError, shown
from model.messages import plain

READ = (*TEXT_FIELDS, *RATINGS)  # of any type
MAX_GROUP = 10**8  # rows of a row group; a damaged file may claim any number
AT_ONCE = 2 << 20  # bytes that are read together
ROWS_AT_ONCE = 128  # that are read together: all may show one picture, which is then there as often
READ_BUFFER = 1 << 16  # bytes; without one pyarrow reads a whole column of a group ahead
UNREADABLE = (pyarrow.ArrowException, OSError, ValueError)  # what pyarrow raises over damage
Row = list[pyarrow.Buffer]  # the pictures of one


class DamagedGroup(Exception):
    """A row group that cannot be read."""


class ParquetSource:
    """text_columns: names and types of what is kept of records; picture_column: bytes of pictures, or lists of them."""

    def __init__(self, path: Path, damaged: dict[int, str] | None = None):
        """damaged: row groups that cannot be read, and why. Raises DataError where it is no parquet of samples."""
        self.path, self.damaged = path, damaged or {}
        try:
            # Without a map of the file, whose pages would count as memory, and without reading ahead.
            self.file = parquet.ParquetFile(
                path, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            self.rows, groups = self.file.metadata.num_rows, range(self.file.num_row_groups)
            self.groups = [self.file.metadata.row_group(number).num_rows for number in groups]
            if sum(self.groups) != self.rows or any(not 0 <= rows <= MAX_GROUP for rows in self.groups):
                raise ValueError(f"row groups of {shown(self.groups)} rows, together {self.rows}")
            schema = {field.name: field.type for field in self.file.schema_arrow}
        except UNREADABLE as error:
            why = plain(str(error)[:200])
            raise DataError(f"{path}: cannot be read as parquet ({why}): download it again") from error
        named = [name for name in (EMBEDDED_PICTURES, *PICTURE_FIELDS) if name in schema]
        self.picture_column = next((name for name in named if _holds(_BYTES, schema[name])), None)
        if named and not any(_holds(_TEXT, schema[name]) or _holds(_BYTES, schema[name]) for name in named):
            raise DataError(
                f"{path}: column {named[0]!r} must be bytes of pictures, names of their files, or lists of either, it "
                f"is {plain(str(schema[named[0]]))}: write the file again with the pictures' files as bytes"
            )
        kept = [*READ, *(named if self.picture_column is None else ())]
        kept += [name for name, kind in schema.items() if name not in (*kept, *named) and _is_plain(_decoded(kind))]
        self.text_columns = {name: _decoded(schema[name]) for name in kept if name in schema}
        check_columns(path, schema)

    @property
    def columns(self) -> list[str]:
        return [*self.text_columns, *filter(None, [self.picture_column])]

    def stored(self, group: int) -> list[tuple[str, parquet.ColumnChunkMetaData]]:
        """What is stored of the columns; their names are the schema's, a damaged group may know them by others."""
        names = [self.file.schema.column(number).path.split(".")[0] for number in range(len(self.file.schema))]
        facts = self.file.metadata.row_group(group)
        return [(name, facts.column(number)) for number, name in enumerate(names) if name in self.columns]

    def read(self, group: int) -> Iterator[tuple[list[pyarrow.Array], list[Row]]]:
        """Text columns and pictures of the rows of a group, some rows at a time.

        Raises DamagedGroup, maybe after the first.
        """
        rows, rows_read = self.groups[group], 0
        size = sum(column.total_uncompressed_size for _, column in self.stored(group))
        step = max(1, min(ROWS_AT_ONCE, AT_ONCE * rows // max(1, size)))
        kinds = [self.file.schema_arrow.field(name).type for name in self.columns]
        together = max(1, rows) if any(map(types.is_dictionary, kinds)) else step  # each batch holds the dictionary
        try:
            for batch in self.file.iter_batches(together, [group], self.columns, use_threads=False):
                batch.validate()
                rows_read += batch.num_rows
                if rows_read > rows:
                    raise ValueError(f"it has more than {rows} rows")
                for start in range(0, batch.num_rows, step):
                    part = batch.slice(start, step)
                    texts = [part.column(name).cast(kind) for name, kind in self.text_columns.items()]
                    yield texts, self._pictures(part)
            if rows_read != rows:
                raise ValueError(f"it has {rows_read} rows instead of {rows}")
        except UNREADABLE as error:
            reason = f"row group {group} cannot be read ({str(error)[:160]}): download the file again"
            raise DamagedGroup(reason) from error

    def _pictures(self, rows: pyarrow.RecordBatch) -> list[Row]:
        """The bytes of the pictures of each row, empty ones left out."""
        if self.picture_column is None:
            return [[] for _ in range(rows.num_rows)]
        cells = rows.column(self.picture_column)
        lists = ((cell.values or ()) if isinstance(cell, pyarrow.ListScalar) else (cell,) for cell in cells)
        return [[content for cell in row if (content := _content(cell))] for row in lists]


_BYTES = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_null
_TEXT = types.is_string, types.is_large_string


def _holds(kinds: tuple, kind: pyarrow.DataType) -> bool:
    """Whether a column of this type is of one of the kinds, of structs with such `bytes`, or of lists of either."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds(kinds, kind.field(at).type)
    return any(is_kind(_decoded(kind)) for is_kind in kinds)


def _is_plain(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type says something of a sample that stays with it, as a JSON line's fields do."""
    plain_kinds = types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating
    return any(is_kind(kind) for is_kind in plain_kinds)


def _decoded(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type without dictionary encoding."""
    return kind.value_type if types.is_dictionary(kind) else kind


def _content(cell: pyarrow.Scalar) -> pyarrow.Buffer | None:
    if isinstance(cell, pyarrow.StructScalar):
        cell = cell["bytes"] if cell.is_valid else cell
    cell = cell.value if isinstance(cell, pyarrow.DictionaryScalar) and cell.is_valid else cell
    return cell.as_buffer() if cell.is_valid else None
