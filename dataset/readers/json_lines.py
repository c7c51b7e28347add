"""JSON on disk: one object a line, or one list of objects; each is parsed when it is asked for."""

import hashlib
import io
import mmap
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.options import ReadOptions
from dataset.readers.pictures import Pictures
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError, parse

MAX_LINE = 16 * 1024 * 1024  # bytes of a line; what is longer is never read into memory
LIST_PART = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)  # a text, or what opens, closes and separates
BLANK = b" \t\r\n"
PLACE = np.dtype((np.int64, 3))  # number, offset, bytes


class JsonLines(Reader):
    """Byte offsets of the objects, so that a large file costs little memory."""

    stored_as = "JSON lines"

    def __init__(self, path: Path, options: ReadOptions, pictures: Pictures | None):
        super().__init__(path, options, pictures)
        with path.open("rb") as file:
            self.state = _facts(file)
            self.is_list = path.suffix == ".json" and _first_letter(file) == b"["
        if self.is_list:
            self.stored_as = "a JSON list"
        places = self._places()
        self._lines, self._rows = places[:, 1:].copy(), len(places)
        is_plain = np.array_equal(places[:, 0], np.arange(1, len(places) + 1))
        self.numbers = None if is_plain else places[:, 0].copy()  # None: no line is blank

    def _places(self) -> np.ndarray:
        """Number, offset and bytes of each object, [objects, 3]."""
        with self._open() as file:
            places = _list_places(file) if self.is_list else _line_places(file)
            return np.fromiter(islice(places, self.options.max_samples or None), PLACE)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lines": None}  # reading processes need no lines: they are rendered

    def __len__(self) -> int:
        return self._rows

    def where(self, index: int) -> str:
        """The line; in a list the number of the entry, which may all stand on one line."""
        return f"{self.path}:{index + 1 if self.numbers is None else self.numbers[index]}"

    def _open(self) -> BinaryIO:
        """The file, to read it again. Raises DataError where it has been replaced, or written to."""
        file = self.path.open("rb")
        if _facts(file) != self.state:
            file.close()
            raise DataError(f"{self.path} has changed since it was opened: start again when it is whole")
        return file

    def facts(self) -> list:
        """Every byte of it."""
        with self._open() as file:
            return [hashlib.file_digest(file, "sha256").hexdigest()]

    def record(self, index: int) -> dict:
        where, what = self.where(index), "entry" if self.is_list else "line"
        if self._lines is None:
            self._lines = self._places()[:, 1:]
        offset, size = self._lines[index].tolist()
        if size > MAX_LINE:
            raise BadSample(where, f"this {what} has {size:,} bytes, more than {MAX_LINE:,}: split or delete it")
        with self._open() as file:
            file.seek(offset)
            line = file.read(size)
        try:
            record = parse(line.decode("utf-8" if offset else "utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"this {what} is no JSON ({str(error)[:120]}): mend or delete it") from error
        if not isinstance(record, dict):
            raise BadSample(where, f"this {what} is {type(record).__name__}, it must be an object {{...}}")
        return record


def _facts(file: BinaryIO) -> tuple[int, ...]:
    """What changes where a file is replaced or written to."""
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _first_letter(file: BinaryIO) -> bytes:
    return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip(BLANK)[:1]


def _line_places(file: io.BufferedReader) -> Iterator[tuple[int, int, int]]:
    """Of each line that is not blank."""
    number = offset = 0
    while part := file.readline(MAX_LINE):
        number, size, blank = number + 1, len(part), not part.strip()
        while not part.endswith(b"\n") and (part := file.readline(MAX_LINE)):
            size, blank = size + len(part), blank and not part.strip()
        if not blank:
            yield number, offset, size
        offset += size


def _list_places(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Of each entry of the list that the file holds, found without parsing one."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        number = depth = start = 0
        for part in LIST_PART.finditer(content):
            sign = part[0]
            if sign in b"[{":
                depth += 1
                start = part.end() if depth == 1 else start
            elif sign in b"]}":
                depth -= 1
            if depth == 0 or depth == 1 and sign == b",":
                if content[start : part.start()].strip(BLANK):
                    number += 1
                    yield number, start, part.start() - start
                start = part.end()
                if depth == 0:
                    break
        if rest := content[start : start + MAX_LINE].strip(BLANK):  # the list has no end, or more stands behind it
            yield number + 1, start, len(rest)
