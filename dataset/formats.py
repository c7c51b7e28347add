"""Readers: each turns one public format into the same Sample. A new format is one class and its line in read_samples.

*.jsonl     MiniMind's: {"conversations": [{"role", "content"}, ...], "image": "a.jpg, b.jpg"} beside a folder of
            images, or {"text": "..."} for the base decoder
*.parquet   MiniMind's: columns conversations (JSON text) and image_bytes (one picture or a list of them)
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset.limits import PictureLimits
from dataset.samples import BadSample, DataError, Sample, check_number, make_sample, parse, shown
from model.files import ROOT
from model.messages import UserError, counted, did_you_mean
from model.processing import NO_FILE, UnreadableFile

ENDINGS = (".jsonl", ".parquet")
AS_LINES = (
    "python -c \"import json; [print(json.dumps(line)) for line in json.load(open('{}', encoding='utf-8'))]\" > {}"
)
COPIES = ROOT / "out" / "rows"
MAX_LINE = 16 * 1024 * 1024  # bytes of a line; what is longer is never read into memory
REASONS_SHOWN = 3  # of samples that were left out, in a line


def read_samples(
    path: str | Path, images_path: str | Path | None = None, copies: Path = COPIES, say: Callable = print,
    limits: PictureLimits | None = None,
) -> Sequence[Sample]:  # fmt: skip
    """Open a data file by its ending; samples are parsed when they are asked for.

    images_path: the folder of a JSONL's pictures; by default `images` beside the file. copies: where a parquet's copy
    goes if the folder that it lies in takes none.
    """
    path, limits = Path(path), limits or PictureLimits()
    if path.suffix not in ENDINGS:
        lines = AS_LINES.format(path, path.with_suffix(".jsonl"))
        cure = f": write its list as lines, {lines}" if path.suffix == ".json" else ""
        raise DataError(f"{path}: the ending {path.suffix!r} is none of {', '.join(ENDINGS)}{cure}")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: check --data_path and --val_path{did_you_mean(path).replace(':', ',')}, or make "
            "Emoji World: python scripts/build_emoji_world.py"
        )
    if path.suffix == ".parquet":
        from dataset.parquet_rows import ParquetRows  # here, as it loads pyarrow, which few runs need

        samples = ParquetRows(path, copies, say, limits)
    else:
        samples = JsonLines(path, Path(images_path) if images_path else path.parent / "images", limits)
    if not len(samples):
        raise DataError(f"{path} holds no sample")
    return samples


class JsonLines(Sequence):
    """Byte offsets of the lines; a line is parsed when it is asked for, so that a large file costs little memory."""

    def __init__(self, path: Path, images_path: Path, limits: PictureLimits):
        self.path, self.images_path, self.limits = path, images_path.resolve(), limits
        with path.open("rb") as file:
            self.facts = _facts(file)
            lines = np.fromiter(_places(file), np.dtype((np.int64, 3)))  # [lines, 3]: number, offset, bytes
        self._lines, self._rows = lines[:, 1:].copy(), len(lines)
        is_plain = np.array_equal(lines[:, 0], np.arange(1, len(lines) + 1))
        self.numbers = None if is_plain else lines[:, 0].copy()  # None: no line is blank

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lines": None}  # reading processes need no lines: they are rendered

    def __len__(self) -> int:
        return self._rows

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1 if self.numbers is None else self.numbers[index]}"

    def _open(self) -> BinaryIO:
        """The file, to read lines again. Raises DataError where it has been replaced, or written to."""
        file = self.path.open("rb")
        if _facts(file) != self.facts:
            file.close()
            raise DataError(f"{self.path} has changed since it was opened: start again when it is whole")
        return file

    def identity(self) -> list:
        """What tells this data from other data, but for its pictures: where it lies, and every byte of it."""
        with self._open() as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return [str(self.path), str(self.images_path), content, *astuple(self.limits)]

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        if self._lines is None:
            with self._open() as file:
                self._lines = np.fromiter(_places(file), np.dtype((np.int64, 3)))[:, 1:]
        offset, size = self._lines[index].tolist()
        if size > MAX_LINE:
            raise BadSample(where, f"this line has {size:,} bytes, more than {MAX_LINE:,}: split or delete it")
        with self._open() as file:
            file.seek(offset)
            line = file.read(size)
        try:
            record = parse(line.decode("utf-8" if offset else "utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"this line is no JSON ({str(error)[:120]}): mend or delete it") from error
        if not isinstance(record, dict):
            raise BadSample(where, f"this line is {type(record).__name__}, it must be an object {{...}}")
        sample = make_sample(where, record, [self._locate(where, name) for name in self._names(where, record)])
        return replace(sample, max_pixels=self.limits.max_pixels)

    @staticmethod
    def _names(where: str, record: dict) -> list[str]:
        names = record.get("image") or []
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise BadSample(where, f"'image' is {shown(names)}: it must be a file name or a list of them")
        check_number(where, names)
        return names

    def _locate(self, where: str, name: str) -> Path:
        """Where a picture lies, found without opening it: a regular file inside the folder, whatever links lead to.

        With follow_links the name must lie inside, and links there may lead anywhere.

        The path is the one that was named, so that a link that leads elsewhere tomorrow shows in the file's facts.
        """
        if "://" in name:
            raise BadSample(where, f"picture {shown(name)} is an address: download it, and give its file's name")
        try:
            named = self.images_path / name
            path = named.resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, half a surrogate pair, a loop of links
            if isinstance(error, OSError) and error.errno not in NO_FILE:
                raise BadSample(where, f"picture {shown(name)}: {UnreadableFile(error)}") from error
            raise BadSample(where, f"no file can be called {name[:80]!r} ({str(error)[:80]})") from error
        is_inside = not os.path.isabs(name) and ".." not in Path(name).parts
        if not (is_inside if self.limits.follow_links else path.is_relative_to(self.images_path)):
            cure = "use names inside --images_path"
            if is_inside:
                cure += ", or --follow_links 1 where links may lead out of it"
            raise BadSample(where, f"picture {name[:80]!r} lies outside {self.images_path}: {cure}")
        if exists and not path.is_file():
            raise BadSample(where, f"picture {name[:80]!r} is no regular file")
        return named


def _facts(file: BinaryIO) -> tuple[int, ...]:
    """What changes where a file is replaced or written to."""
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _places(file: io.BufferedReader) -> Iterator[tuple[int, int, int]]:
    """Number, offset and bytes of each line that is not blank."""
    number = offset = 0
    while part := file.readline(MAX_LINE):
        number, size, blank = number + 1, len(part), not part.strip()
        while not part.endswith(b"\n") and (part := file.readline(MAX_LINE)):
            size, blank = size + len(part), blank and not part.strip()
        if not blank:
            yield number, offset, size
        offset += size


def open_data(
    path: str | Path, images_path: str | Path | None = None, limits: PictureLimits | None = None
) -> Sequence[Sample]:
    """The file that a command was given with --data and --images_path. Raises UserError where it cannot be used."""
    if Path(path).suffix and not Path(path).exists():
        raise UserError(f"{path} does not exist{did_you_mean(path) or ': check --data'}")
    if images_path and not Path(images_path).is_dir():
        raise UserError(f"--images_path {images_path} is no folder{did_you_mean(images_path)}")
    return read_samples(path, images_path, limits=limits)


def left_out(reasons: Sequence[object], count: int, things: str) -> str:
    """One line about what could not be used, of so many. Raises UserError where that is all of them."""
    first = "; ".join(map(str, reasons[:REASONS_SHOWN])) + ("; ..." if len(reasons) > REASONS_SHOWN else "")
    if len(reasons) == count:
        raise UserError(first if count == 1 else f"none of {counted(count, things)} can be used: {first}")
    return f"left out {len(reasons):,} of {counted(count, things)}: {first}"
