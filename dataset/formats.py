"""Readers: each turns one public format into the same Sample. A new format is one class and its line in read_samples.

*.jsonl     MiniMind's: {"conversations": [{"role", "content"}, ...], "image": "a.jpg, b.jpg"} beside a folder of
            images, or {"text": "..."} for the base decoder
*.parquet   MiniMind's: columns conversations (JSON text) and image_bytes (one picture or a list of them)
"""

import hashlib
import io
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dataset.limits import PictureLimits
from model.files import ROOT
from model.messages import UserError, counted, did_you_mean, plain
from model.processing import MAX_PIXELS, NO_FILE, SampleError, TooManyPixels, UnreadableFile, open_picture

ENDINGS = (".jsonl", ".parquet")
BAD, DROPPED, DAMAGED = "bad", "dropped", "damaged"  # kinds of Rejected
HELP = "docs/data_formats.md"
AS_LINES = (
    "python -c \"import json; [print(json.dumps(line)) for line in json.load(open('{}', encoding='utf-8'))]\" > {}"
)
COPIES = ROOT / "out" / "rows"
MAX_LINE = 16 * 1024 * 1024  # bytes of a line; what is longer is never read into memory
MAX_PICTURES = 1000  # of a sample
PLACEHOLDER_BYTES, PLACEHOLDER_SIDE = 4096, 16  # at most; and pixels of one colour
REASONS_SHOWN = 3  # of samples that were left out, in a line
MAX_TEXT = 1_000_000  # letters of a text: far more than any --max_seq_len keeps, half a second of the tokenizer's time


class DataError(UserError):
    """Data that cannot be trained on; the message names file, line, reason and cure."""


class Rejected(NamedTuple):
    """A sample that is not learnt from, as quarantine.jsonl names it."""

    where: str  # file:line
    reason: str  # and the cure
    kind: str = BAD  # BAD, DROPPED or DAMAGED, see dataset.quarantine

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadSample(DataError):
    """Raised over one sample that cannot be used, where the others may."""

    def __init__(self, where: str, reason: str, kind: str = BAD):
        self.rejected = Rejected(plain(where), plain(" ".join(reason.split())), kind)
        super().__init__(*self.rejected)

    def __str__(self) -> str:
        return str(self.rejected)


_short = reprlib.Repr()  # a value in a message: a few items, a few levels, however large it is
_short.maxstring = _short.maxother = 60
shown = _short.repr


@dataclass(frozen=True)
class Sample:
    """One conversation with its pictures, or one plain text."""

    where: str  # file:line, for messages
    messages: list[dict]
    pictures: tuple[Path | bytes, ...] = ()
    text: str | None = None  # then there are no messages
    extra: dict = field(default_factory=dict, compare=False)  # the record's other fields
    max_pixels: int = field(default=MAX_PIXELS, compare=False)  # of a picture

    def open_pictures(self, decode: bool = True) -> list[Image.Image]:
        """RGB pictures in order. Raises BadSample naming the line and the file."""
        return [self.open_picture(number, decode) for number in range(len(self.pictures))]

    def open_picture(self, number: int, decode: bool = True) -> Image.Image:
        """One of them, counted from 0."""
        source = self.pictures[number]
        name = str(source) if isinstance(source, Path) else f"picture {number + 1}"
        try:
            return open_picture(source if isinstance(source, Path) else io.BytesIO(source), decode, self.max_pixels)
        except SampleError as error:
            cure = ", or raise --max_megapixels" if isinstance(error, TooManyPixels) else ""
            raise BadSample(self.where, f"{name}: {error}{cure}") from error


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
        from dataset.parquet_rows import ParquetRows  # it loads pyarrow, which few runs need, and imports this file

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


def parse(text: str) -> object:
    """JSON, without what it leaves open: ValueError for NaN, infinity and a name that stands twice in one object."""
    return json.loads(text, parse_constant=_no_number, object_pairs_hook=_all_different)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _all_different(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        most, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(most)} stands twice in one object")
    return record


def make_sample(where: str, record: dict, pictures: list[Path] | list[bytes]) -> Sample:
    """Check what can be checked without the tokenizer. Raises BadSample."""
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise BadSample(where, "'text' must be text that is not empty")
        if pictures:
            raise BadSample(
                where,
                f"'text' is learnt without pictures, but 'image' names {len(pictures)}: delete 'image', or give "
                "'conversations' with an <image> for each",
            )
        _check_length(where, record["text"])
        return Sample(where, [], (), record["text"])
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadSample(where, f'\'conversations\' must be a list of {{"role", "content"}}, it is {shown(messages)}')
    for message in messages:
        if {"from", "value"} <= message.keys():
            raise BadSample(
                where, "these are LLaVA's or ShareGPT's turns ('from', 'value'), a turn here has 'role' and 'content': "
                f"{HELP} has the lines that rename them"
            )  # fmt: skip
        if not isinstance(message.get("content"), str):
            raise BadSample(where, f"a message's 'content' must be text, it is {shown(message.get('content'))}")
        _check_length(where, message["content"])
    tags = sum(message["content"].count("<image>") for message in messages)
    if not tags and len(pictures) == 1 and isinstance(pictures[0], bytes) and is_placeholder(pictures[0]):
        pictures = []
    if tags != len(pictures):
        there = counted(len(pictures), "pictures")
        raise BadSample(where, f"the text holds {tags} <image> but the sample has {there}: make them equal")
    extra = {name: value for name, value in record.items() if name not in ("conversations", "image")}
    return Sample(where, messages, tuple(pictures), extra=extra)


@lru_cache(maxsize=64)  # MiniMind's are all the same
def is_placeholder(content: bytes) -> bool:
    """Whether a picture only fills a column: MiniMind's parquet has 8 x 8 black pixels beside talks of text alone."""
    if len(content) > PLACEHOLDER_BYTES:
        return False
    try:
        if max(open_picture(io.BytesIO(content), decode=False).size) > PLACEHOLDER_SIDE:
            return False
        return all(low == high for low, high in open_picture(io.BytesIO(content)).getextrema())
    except SampleError:
        return False


def check_number(where: str, pictures: list) -> None:
    if len(pictures) > MAX_PICTURES:
        raise BadSample(where, f"it has {len(pictures):,} pictures, more than {MAX_PICTURES:,}: split or delete it")


def _check_length(where: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise BadSample(where, f"a text of {len(text):,} letters, more than {MAX_TEXT:,}: split or delete it")


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
