"""What is streamed, written down once: a stream has no random access, and shuffling and exact resuming need it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet, types

from dataset.formats import EMBEDDED_PICTURES, NESTED_FIELDS, PICTURE_FIELDS
from dataset.options import ReadOptions
from dataset.readers.hub_query import HubQuery
from dataset.readers.hub_rows import hub_pictures, kept_columns, load, record_of, told
from dataset.readers.parquet_copy import wait_for_turn
from dataset.samples import BadSample, DataError
from model.files import written_aside
from model.messages import NO_ROOM, counted, plain
from model.process_lock import ProcessLock
from model.progress import Progress

ROWS_AT_ONCE = 32  # that the library is asked for
GROUP_BYTES = 16 << 20  # of pictures and texts that are held, then written as a row group
GROUP_ROWS = 1000  # at most
PICTURES = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.string())]))
MOST_NAMED = 3  # pictures that could not be read, in the log


def kept_stream(query: HubQuery, options: ReadOptions, copies: Path, say: Callable) -> Path:
    """The parquet of the first --max_samples rows, in order; written while they come, unless it is there already.

    It is kept until somebody deletes it: the hub is not asked whether its data have changed since. Where processes
    start side by side, one writes and the others wait.

    Raises:
        DataError: the stream broke off, or the disk is full; nothing is left behind.
    """
    place = copies / f"{query.short_name(options.max_samples)}.parquet"
    if not place.is_file():
        try:
            copies.mkdir(parents=True, exist_ok=True)
            with ProcessLock(place.with_name(f".{place.name}.lock")) as lock:
                wait_for_turn(lock, (query.text, "streams", place), say)
                if not place.is_file():
                    for litter in copies.glob(f".{place.name}.*.tmp"):  # of a process that was killed; we hold the lock
                        litter.unlink(missing_ok=True)
                    Stream(query, options, say, lock.show_life).write(place)
        except OSError as error:
            why = plain(os.strerror(error.errno) if error.errno else str(error))
            cure = "make room" if error.errno in NO_ROOM else "mend that"
            raise DataError(
                f"{query.text}: what is streamed is kept in {copies}, which cannot take it ({why}): {cure}, or "
                "give a --save_dir elsewhere"
            ) from error
    say(f"{query.text}: kept in {place}, which later starts read without asking the hub; delete it to stream anew")
    return place


class Stream:
    """Rows as they come, to a parquet."""

    def __init__(self, query: HubQuery, options: ReadOptions, say: Callable, show_life: Callable[[], None]):
        self.query, self.most, self.say, self.show_life = query, options.max_samples, say, show_life
        self.pictures, self.unread = hub_pictures(query, options), 0

    def write(self, place: Path) -> None:
        """Complete or not at all. Raises OSError where the disk takes no more, DataError over all else."""
        self.say(f"{self.query.text}: streamed once into {place.parent}, to read rows in any order")
        with written_aside(place) as aside, pyarrow.OSFile(str(aside), "wb") as sink, RowWriter(sink) as writer:
            with Progress(self.most or None, "streaming", "row") as progress:
                for rows, (record, kinds) in enumerate(self._records()):
                    self._embed(record, rows + 1)
                    try:
                        writer.add(record, kinds)
                    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
                        why = plain(str(error)[:200])
                        raise DataError(
                            f"{self.query.text}:{rows + 1}: it differs from the rows before ({why})"
                        ) from error
                    progress.update()
                    self.show_life()
            if writer.schema is None:
                raise DataError(f"{self.query.text} holds no sample")
        if self.unread:
            self.say(f"{self.query.text}: {counted(self.unread, 'pictures')} could not be read")

    def _records(self) -> Iterator[tuple[dict, dict]]:
        """Each row's record, and the library's kinds of the columns."""
        kinds, left = {}, self.most or None
        with told(self.query):
            for table in load(self.query).with_format("arrow").iter(ROWS_AT_ONCE):
                if not kinds:
                    kinds = kinds_of(table.schema, self.query.text)
                for row in table.slice(0, left).to_pylist():
                    yield record_of(row, kinds), kinds
                left = None if left is None else left - len(table)
                if left is not None and left <= 0:
                    break

    def _embed(self, record: dict, row: int) -> None:
        """Put in the bytes of pictures that a row holds the paths of."""
        for name in PICTURE_FIELDS:
            value = record.get(name)
            for picture in _listed(value):
                if isinstance(picture, dict) and not picture.get("bytes") and picture.get("path"):
                    try:
                        picture["bytes"] = self._content(picture["path"], f"{self.query.text}:{row}")
                    except BadSample as error:
                        picture["bytes"] = b"not read"  # no picture, so that whoever opens it leaves the sample out
                        self.unread += 1
                        if self.unread <= MOST_NAMED:
                            self.say(str(error))

    def _content(self, path: str, where: str) -> bytes:
        """Raises BadSample where it is neither the data set's own file nor one of its repository."""
        if "://" in path:
            repository = f"hf://datasets/{self.query.dataset}@"
            if not path.split("::")[-1].startswith(repository):
                raise BadSample(where, f"picture {path[:80]!r} is no file of the data set: it is not read")
            from datasets.utils.file_utils import xopen

            with told(self.query), xopen(path, "rb") as file:
                return file.read()
        found = self.pictures.find(where, path)
        if isinstance(found, bytes):
            return found
        try:
            return found.read_bytes()
        except OSError as error:
            raise BadSample(where, f"picture {path[:80]!r} cannot be read ({error.strerror})") from error


def kinds_of(schema: pyarrow.Schema, path: str) -> dict:
    """The library's kinds of the columns that are kept. Raises DataError where no format knows any."""
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    return {name: features[name] for name in kept_columns(features, path)}


class RowWriter:
    """Records to row groups of GROUP_BYTES; conversations as JSON text, whose fields may differ from row to row."""

    def __init__(self, sink: pyarrow.NativeFile):
        self.sink, self.schema, self.writer = sink, None, None
        self.rows: list[pyarrow.RecordBatch] = []
        self.size = 0

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.writer and kind:
            self.writer.is_open = False  # or it would try to end a file that nobody wants
        elif self.writer:
            self._flush()
            self.writer.close()

    def add(self, record: dict, kinds: dict) -> None:
        """kinds: the library's, of the columns. Raises ArrowInvalid or ArrowTypeError where a value is of another."""
        if self.schema is None:
            self.schema = pyarrow.schema([(name, _stored_type(name, kind)) for name, kind in kinds.items()])
            self.writer = parquet.ParquetWriter(self.sink, self.schema, use_dictionary=False)
        row = {field.name: _stored(record.get(field.name), field.type) for field in self.schema}
        batch = pyarrow.RecordBatch.from_pylist([row], self.schema)
        self.rows.append(batch)
        self.size += batch.nbytes
        if self.size >= GROUP_BYTES or len(self.rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pyarrow.Table.from_batches(self.rows, self.schema), GROUP_ROWS)
            pyarrow.default_memory_pool().release_unused()  # it would keep a multiple of what is ever used at a time
        self.rows, self.size = [], 0


def _stored_type(name: str, kind: object) -> pyarrow.DataType:
    from datasets import Features

    stored = Features({name: kind}).arrow_schema.field(0).type
    if name in (EMBEDDED_PICTURES, *PICTURE_FIELDS):
        return stored if _are_names(stored) else PICTURES
    return pyarrow.string() if name in NESTED_FIELDS or _holds_json(kind) else stored


def _are_names(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _holds_json(kind: object) -> bool:
    return "Json(" in repr(kind)


def _stored(value: object, kind: pyarrow.DataType) -> object:
    if value is None:
        return None
    if kind == PICTURES:
        return [{"bytes": one, "path": None} if isinstance(one, bytes) else one for one in _listed(value)]
    return json.dumps(value, ensure_ascii=False) if types.is_string(kind) and not isinstance(value, str) else value


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]
