"""What every reader gives: a Sample, or the reason why there is none."""

import contextlib
import io
import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from model.messages import UserError, plain
from model.pictures import MAX_PIXELS, SampleError, TooManyPixels, open_picture, upright_size
from model.processing import VLMProcessor
from model.video import headings_of_video, is_video, open_video
from model.views import FRAMES, UNCUT, Cut, Frames, Sight, Times

BAD, DROPPED, DAMAGED = "bad", "dropped", "damaged"  # kinds of Rejected
STRIP = 224  # pixels of a frame of a video, where its frames stand in a row for people
MAX_PICTURES = 1000  # of a sample
PLACEHOLDER_BYTES, PLACEHOLDER_SIDE = 4096, 16  # at most; and pixels of one colour
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
    pictures: tuple[Path | bytes, ...] = ()  # and videos
    text: str | None = None  # then there are no messages
    extra: dict = field(default_factory=dict, compare=False)  # the record's other fields
    max_pixels: int = field(default=MAX_PIXELS, compare=False)  # of a picture

    def open_pictures(self, decode: bool = True) -> list[Image.Image]:
        """RGB pictures in order. Raises BadSample naming the line and the file."""
        return [self.open_picture(number, decode) for number in range(len(self.pictures))]

    def open_picture(self, number: int, decode: bool = True) -> Image.Image:
        """One of them, counted from 0; of a video some frames in a row, or without `decode` the first."""
        source = self.pictures[number]
        with self._named(number):
            if is_video(source):
                return open_video(source, FRAMES if decode else 1).strip(STRIP)
            return open_picture(source if isinstance(source, Path) else io.BytesIO(source), decode, self.max_pixels)

    def open_shown(self, sight: Sight) -> list[Image.Image | Frames]:
        """All of them as a prompt takes them. Raises BadSample."""
        return [self._open_shown(number, sight) for number in range(len(self.pictures))]

    def _open_shown(self, number: int, sight: Sight) -> Image.Image | Frames:
        if not is_video(self.pictures[number]):
            return self.open_picture(number)
        with self._named(number):
            return open_video(self.pictures[number], sight.frames, sight.square)

    def cut(self, number: int, sight: Sight) -> Cut:
        """How one of them is cut, by its header; nothing is opened where none is. Raises BadSample."""
        if is_video(self.pictures[number]):
            with self._named(number):
                return Times(headings_of_video(self.pictures[number], sight.frames))
        if not sight.tiles:
            return UNCUT
        return sight.grid(*upright_size(self.open_picture(number, decode=False)))

    def open_views(self, number: int, processor: VLMProcessor) -> list[torch.Tensor]:
        """uint8 [3, side, side] of each of its views. Raises BadSample."""
        shown = self._open_shown(number, processor.sight)
        return processor.views(shown, None if isinstance(shown, Frames) else self.cut(number, processor.sight))

    def refuse_videos(self, who: str) -> None:
        """For who takes pictures alone. Raises BadSample."""
        if any(map(is_video, self.pictures)):
            raise BadSample(self.where, f"it shows a video, and {who} takes pictures alone: leave the line out")

    @contextlib.contextmanager
    def _named(self, number: int) -> Iterator[None]:
        """What is wrong with one of them becomes a BadSample that names it."""
        source = self.pictures[number]
        name = str(source) if isinstance(source, Path) else f"picture {number + 1}"
        try:
            yield
        except SampleError as error:
            cure = ", or raise --max_megapixels" if isinstance(error, TooManyPixels) and not is_video(source) else ""
            raise BadSample(self.where, f"{name}: {error}{cure}") from error


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
