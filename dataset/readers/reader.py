"""Reader: one source of records, each of which becomes a Sample when it is asked for.

A new way of storing records is a subclass: how many there are, what record number n is, where it stands, and what tells
this data from other data.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from dataset.formats import (
    EMBEDDED_PICTURES,
    FORMATS,
    TEXT_FIELDS,
    VIDEO_FIELDS,
    Unfit,
    Video,
    read_record,
    recognised,
)
from dataset.options import AUTO, ReadOptions
from dataset.readers.pictures import PictureFolder, Pictures
from dataset.samples import BadSample, DataError, Sample, check_number, is_placeholder, shown
from model.messages import counted
from model.processing import IMAGE_TAG
from model.video import VIDEO_ENDINGS, is_video

LOOKED_AT = 1000  # records among which the first that tells its format is looked for


class Reader(Sequence):
    """path: for messages; pictures: where those lie that records name, None where records hold them all."""

    stored_as = ""  # for the log

    def __init__(self, path: Path | str, options: ReadOptions, pictures: Pictures | None = None):
        self.path, self.options, self.pictures, self.format = path, options, pictures, options.data_format

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> dict:
        """Raises BadSample."""

    @abstractmethod
    def where(self, index: int) -> str:
        """file:line, or what stands for it."""

    @abstractmethod
    def facts(self) -> list:
        """What tells this data from other data, as JSON holds it; pictures that are files of their own aside."""

    def identity(self) -> list:
        """Of this data, read in this way."""
        options = self.options
        pictures = self.pictures.identity() if self.pictures else []
        how = [options.max_samples, options.min_rating, options.follow_links, options.max_megapixels]
        return [str(self.path), self.format, *self.facts(), *pictures, *how]

    def recognise(self) -> "Reader":
        """Settle the format, by the first record that tells it. Raises DataError where none does."""
        if self.format != AUTO:
            return self
        fields: dict[str, None] = {}
        for index in range(min(len(self), LOOKED_AT)):
            try:
                record = self.record(index)
            except BadSample:
                continue
            if name := recognised(record):
                self.format = name
                return self
            fields |= dict.fromkeys(record)
        known = ", ".join(TEXT_FIELDS)
        if fields:
            raise DataError(
                f"{self.path}: no record holds what a format is known by ({known}); the first have "
                f"{shown(list(fields))}: rename the fields, see docs/data_formats.md"
            )
        self.format = "minimind"  # every record is bad, and each will say why
        return self

    def describe(self) -> str:
        return f"{self.path}: {self.format} in {self.stored_as}, {counted(len(self), 'records')}"

    def __getitem__(self, index: int) -> Sample:
        where, record = self.where(index), self.record(index)
        try:
            talk, names = read_record(record, self.format, self.options)
        except Unfit as unfit:
            raise BadSample(where, unfit.reason, unfit.kind) from unfit
        check_number(where, names)
        pictures = [self._picture(where, name) for name in names]
        tags = sum(message["content"].count(IMAGE_TAG) for message in talk.messages)
        if not tags and len(pictures) == 1 and isinstance(pictures[0], bytes) and is_placeholder(pictures[0]):
            pictures = []
        if tags != len(pictures) and talk.text is None:
            there = counted(len(pictures), "pictures")
            raise BadSample(where, f"the text holds {tags} <image> but the sample has {there}: make them equal")
        known = FORMATS[self.format]
        used = {*TEXT_FIELDS, *known.pictures, *VIDEO_FIELDS, EMBEDDED_PICTURES} - {*known.kept}
        extra = {name: value for name, value in record.items() if name not in used}
        return Sample(where, talk.messages, tuple(pictures), talk.text, extra, self.options.max_pixels)

    def _picture(self, where: str, name: str | bytes | dict | Video) -> Path | bytes:
        if isinstance(name, Video):
            return self._video(where, name.source)
        if isinstance(name, dict):
            name = name["bytes"] or name.get("path") or b""
        if isinstance(name, bytes):
            return name
        if self.pictures is None:
            raise BadSample(where, f"picture {shown(name)} is named, and no folder is: give --images_path")
        return self.pictures.find(where, name)

    def _video(self, where: str, name: str | bytes | dict) -> Path | bytes:
        """By default it lies beside the data file, in any folder there."""
        if isinstance(name, str) and not self.options.images_path and isinstance(self.path, Path):
            found = PictureFolder(self.path.parent, self.options.follow_links).find(where, name)
        else:
            found = self._picture(where, name)
        if not is_video(found):
            reason = f"has none of the endings {', '.join(VIDEO_ENDINGS)}: rename it, or convert it to mp4"
            raise BadSample(where, f"video {shown(name)} {reason}")
        return found
