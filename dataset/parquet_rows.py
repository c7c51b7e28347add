"""MiniMind's parquet: rows in any order, out of a copy that is mapped into memory."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow

from dataset.limits import PictureLimits
from dataset.parquet_copy import BYTES, TEXTS, arrow_copy
from dataset.samples import BadSample, Sample, check_number, make_sample, parse


class ParquetRows(Sequence):
    """Rows of a parquet, through its Arrow copy (dataset.parquet_copy).

    Parquet can only be read from the start of a row group on; training asks for rows in any order. The copy is written
    once, and all ranks and workers map the same file instead of loading it.
    """

    def __init__(self, path: Path, copies: Path, say: Callable, limits: PictureLimits):
        """copies: the folder for the copy where it cannot lie beside the parquet."""
        self.path, self.limits, self.copy = path, limits, arrow_copy(path, copies, say)

    @functools.cached_property
    def columns(self) -> dict[str, pyarrow.ChunkedArray]:
        """The copy's columns; `pictures` is flattened, so that a picture's number is its index."""
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.copy))).read_all()
        columns = dict(zip(table.column_names, table.columns, strict=True))
        pictures = [chunk.values for chunk in columns["pictures"].chunks]
        return columns | {"pictures": pyarrow.chunked_array(pictures, BYTES)}

    def __getstate__(self) -> dict:
        """For a process that is not forked: it maps the file itself."""
        return {name: value for name, value in vars(self).items() if name != "columns"}

    def __len__(self) -> int:
        return len(self.columns[TEXTS])

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def identity(self) -> list:
        """What tells this data from other data, pictures and all: the copy's name holds size and time of change."""
        return [str(self.path), self.copy.name, self.limits.max_megapixels]

    def __getitem__(self, index: int) -> Sample:
        where, columns = self.where(index), self.columns
        try:
            conversations = columns[TEXTS][index].as_py()
        except UnicodeDecodeError as error:
            raise BadSample(where, f"'conversations' is no UTF-8 ({error}): mend or delete the row") from error
        if reason := columns["damage"][index].as_py():
            raise BadSample(where, reason)
        try:
            if isinstance(conversations, str):
                conversations = parse(conversations)
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"'conversations' is no JSON ({str(error)[:120]})") from error
        numbers = columns["shows"][index].as_py()
        check_number(where, numbers)
        pictures = [columns["pictures"][number].as_py() for number in numbers]
        sample = make_sample(where, {"conversations": conversations}, pictures)
        return replace(sample, max_pixels=self.limits.max_pixels)
