"""Plain text for the base decoder: a .txt, whose paragraphs stand apart by blank lines."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.options import AUTO, ReadOptions
from dataset.readers.reader import Reader
from dataset.samples import BadSample, DataError

MARK = "\ufeff".encode()  # of byte order, with which some files begin
MOST = 2048  # bytes of a sample, some 500 tokens of English: a longer paragraph becomes several, cut between lines
PLACE = np.dtype((np.int64, 3))  # line, offset, bytes


class PlainText(Reader):
    """A paragraph is a sample; a line alone is never cut."""

    stored_as = "paragraphs"

    def __init__(self, path: Path, options: ReadOptions):
        super().__init__(path, options)
        self.format = "text" if options.data_format == AUTO else options.data_format
        with path.open("rb") as file:
            self.places = np.fromiter(islice(_samples(file), options.max_samples or None), PLACE)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, index: int) -> str:
        return f"{self.path}:{self.places[index, 0]}"

    def facts(self) -> list:
        with self.path.open("rb") as file:
            return [hashlib.file_digest(file, "sha256").hexdigest()]

    def record(self, index: int) -> dict:
        _, offset, size = self.places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise DataError(f"{self.path} has changed since it was opened: start again when it is whole")
        try:
            return {"text": content.decode("utf-8" if offset else "utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise BadSample(self.where(index), f"it is no UTF-8 ({error}): save the file as UTF-8") from error


def _samples(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Line, offset and bytes of each sample."""
    first = start = size = offset = 0
    for number, line in enumerate(file, 1):
        blank = not line.removeprefix(MARK if number == 1 else b"").strip()
        if size and (blank or size + len(line) > MOST):
            yield first, start, size
            size = 0
        if not blank:
            if not size:
                first, start = number, offset
            size += len(line)
        offset += len(line)
    if size:
        yield first, start, size
