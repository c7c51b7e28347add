"""A .tsv as VLMEvalKit's data sets are published: a table whose cells hold pictures, in base64, beside the words."""

import ast
import base64
import binascii
import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.formats import EMBEDDED_PICTURES
from dataset.options import ReadOptions
from dataset.readers.pictures import Pictures
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError, shown

MAX_CELL = 64 * 1024 * 1024  # letters; Python's own limit is 131,072, less than one picture
LONGEST_INDEX = 64  # letters: a shorter `image` is the index of the row whose picture it shares, or a file's name
PLACE = np.dtype((np.int64, 3))  # line, offset, bytes


class TsvRows(Reader):
    """Byte offsets of the rows, each of which is parsed when it is asked for: some of these files have gigabytes."""

    stored_as = "a table with pictures in it"

    def __init__(self, path: Path, options: ReadOptions, pictures: Pictures | None):
        super().__init__(path, options, pictures)
        places, self._row_of = [], {}  # of each index its row
        with path.open("rb") as file:
            rows = self._rows(file)
            self.names = next(rows, ([], None))[0]
            column = self.names.index("index") if "index" in self.names else None
            for number, (row, place) in enumerate(islice(rows, options.max_samples or None)):
                places.append(place)
                if column is not None and column < len(row):
                    self._row_of.setdefault(row[column], number)
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def _rows(self, file: BinaryIO) -> Iterator[tuple[list[str], tuple[int, int, int]]]:
        """Cells and place of each row that is not blank, the line of names first."""
        lines = Lines(file)
        rows, before = _table(lines), (1, 0)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(
                    f"{self.path}:{before[0]}: cannot be read as a table ({error}): mend this row, a quotation mark "
                    "that is not closed for example"
                ) from error
            if row is None:
                return
            if row:
                yield row, (*before, lines.offset - before[1])
            before = lines.number + 1, lines.offset

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._places[index, 0]}"

    def facts(self) -> list:
        with self.path.open("rb") as file:
            return [hashlib.file_digest(file, "sha256").hexdigest()]

    def record(self, index: int) -> dict:
        """The cells that are not empty; pictures as bytes, or as names where the row names files."""
        where, row = self.where(index), self._cells(index)
        if pictures := row.pop("image", ""):
            if len(pictures) <= LONGEST_INDEX and pictures in self._row_of:
                pictures = self._cells(self._row_of[pictures]).get("image", "")
            cells = [text for text in _texts(where, "image", pictures) if text]
            if all(len(cell) <= LONGEST_INDEX for cell in cells):
                row["image"] = cells
            else:
                row[EMBEDDED_PICTURES] = [_decoded(where, cell) for cell in cells]
        elif "image_path" in row:
            row["image"] = _texts(where, "image_path", row.pop("image_path"))
        if "answer" in row:
            answers = _texts(where, "answer", row["answer"])
            row["answer"] = answers if len(answers) > 1 else answers[0]
        return row

    def _cells(self, index: int) -> dict[str, str]:
        _, offset, size = self._places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise DataError(f"{self.path} has changed since it was opened: start again when it is whole")
        cells = next(_table(io.StringIO(content.decode("utf-8", "surrogateescape"), newline="")), [])
        if len(cells) > len(self.names):
            raise BadSample(self.where(index), "it has more fields than the first line has names: quote its tabs")
        return {name: cell for name, cell in zip(self.names, cells, strict=False) if cell.strip()}


def _table(lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_CELL)  # of the whole process, and each of them must be told
    return csv.reader(lines, delimiter="\t")


class Lines:
    """The lines of a file as text, and how far they have been read."""

    def __init__(self, file: BinaryIO):
        self.file, self.number, self.offset = file, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number, self.offset = self.number + 1, self.offset + len(line)
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def _texts(where: str, name: str, cell: str) -> list[str]:
    """What a cell says; several texts where it is written as a list."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        texts = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]  # words in brackets
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadSample(where, f"{name!r} is the list {shown(texts)}: it must hold texts")
    return texts


def _decoded(where: str, cell: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(
            where, f"its 'image' {cell[:40]!r}... is no base64 ({error}): write the picture anew"
        ) from error
