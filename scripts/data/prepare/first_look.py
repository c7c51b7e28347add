"""The first look at all samples of a data set: what of each decides whether, where and beside which others it is kept.

A Survey is a few arrays, however large the pictures are, and is kept in a file: who was stopped need not look again.
"""

import json
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from dataset.check import EMBEDDED, PicturesSeen, render_whole, stamp_of
from dataset.quarantine import Quarantine
from dataset.samples import BAD, BadSample, Rejected, Sample
from dataset.split import print_of_text
from model.files import written_aside
from model.messages import plain
from model.processing import VLMProcessor
from model.progress import Progress
from model.tokenizer_files import load_tokenizer
from scripts.data.prepare.columns import DIGEST, Columns, digest_of, facts_of, text_of

MAX_BYTES = 1 << 29  # of one sample's pictures: a page of a parquet holds less than 2 GB


@dataclass
class Survey:
    """Of the samples that can be used, in their order."""

    numbers: np.ndarray  # int64 [usable], as the data set counts them
    digests: np.ndarray  # uint8 [usable, DIGEST], see digest_of
    sizes: np.ndarray  # int64 [usable, 2], bytes of text and fields, of pictures
    units: np.ndarray  # uint64 [usable], equal where the same pictures are shown: such neighbours stay together
    contents: np.ndarray  # uint64 [prints of all], as dataset.split groups by
    starts: np.ndarray  # int64 [usable + 1], where each sample's begin
    columns: np.ndarray  # uint8: JSON of a Columns
    rejected: np.ndarray  # uint8: JSON, the fields of a Rejected each
    names: np.ndarray  # bytes [pictures], see CheckedData
    stamps: np.ndarray  # int64 [pictures, 2]

    def rejections(self) -> list[Rejected]:
        return [Rejected(*values) for values in json.loads(self.rejected.tobytes())]

    def changed_picture(self) -> str | None:
        """The file of a picture that is no longer what was looked at; None: all are."""
        for name, stamp in zip(self.names.tolist(), self.stamps.tolist(), strict=True):
            if tuple(stamp) not in (EMBEDDED, stamp_of(name)):
                return plain(name.decode(errors="replace"))
        return None

    def write(self, path: Path, facts: dict) -> None:
        """facts: what the survey is of. Raises OSError."""
        arrays = {column.name: getattr(self, column.name) for column in fields(self)}
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, facts=_bytes(facts), **arrays)

    @classmethod
    def read(cls, path: Path) -> tuple["Survey", dict] | None:
        """The survey and its facts; None where there is none, or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)  # read to the end, which compares the checksums
                facts = json.loads(arrays.pop("facts").tobytes())
                return cls(**arrays), facts
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            return None


class Surveyor:
    """Looks at every sample: what training would call bad is left out, every picture is decoded to its end."""

    def __init__(self, samples: Sequence[Sample], quarantine: Quarantine):
        self.samples, self.quarantine = samples, quarantine
        self.processor = VLMProcessor(load_tokenizer())
        self.pictures, self.columns = PicturesSeen(), Columns()
        self.facts: dict[int, tuple[bytes, int]] = {}  # of each picture
        self.numbers, self.sizes, self.units = array("q"), array("q"), array("Q")
        self.contents, self.starts, self.digests = array("Q"), array("q", [0]), bytearray()
        self.rejected: list[Rejected] = []

    def run(self) -> Survey:
        """Raises DataError where too many samples are bad."""
        bad: list[Rejected] = []
        with Progress(len(self.samples), "looking", "sample") as progress:
            for number in range(len(self.samples)):
                try:
                    sample = self.samples[number]
                    self._keep(number, sample, self._check(sample))
                except BadSample as error:
                    self.rejected.append(error.rejected)
                    bad += [error.rejected] if error.rejected.kind == BAD else []
                    self.quarantine.reject(error.rejected, bad, len(self.samples))
                progress.update()
        self.quarantine.refuse_too_many(bad, len(bad), len(self.samples))
        seen = self.pictures.columns()
        return Survey(
            numbers=np.array(self.numbers, np.int64),
            digests=np.frombuffer(bytes(self.digests), np.uint8).reshape(-1, DIGEST),
            sizes=np.array(self.sizes, np.int64).reshape(-1, 2),
            units=np.array(self.units, np.uint64),
            contents=np.array(self.contents, np.uint64),
            starts=np.array(self.starts, np.int64),
            columns=np.frombuffer(self.columns.to_json().encode(), np.uint8),
            rejected=_bytes(self.rejected),
            names=seen["names"],
            stamps=seen["stamps"],
        )

    def _check(self, sample: Sample) -> tuple[int, ...]:
        """The numbers of its pictures, now decoded and hashed. Raises BadSample."""
        sample.refuse_videos("what is prepared")
        render_whole(sample, self.processor)
        shown = tuple(map(self.pictures.number, sample.pictures))
        self.pictures.open(sample, shown, decode=True)
        for number, picture in zip(shown, sample.pictures, strict=True):
            if number not in self.facts:
                self.facts[number] = facts_of(picture)
        if (size := sum(self.facts[number][1] for number in shown)) > MAX_BYTES:
            raise BadSample(sample.where, f"its pictures have {size:,} bytes, more than {MAX_BYTES:,}: split it")
        return shown

    def _keep(self, number: int, sample: Sample, shown: tuple[int, ...]) -> None:
        text, pictures = text_of(sample), [self.facts[picture] for picture in shown]
        prints = [self.pictures.prints[picture] for picture in shown] or [print_of_text(text.encode())]
        self.columns.add(sample)
        self.numbers.append(number)
        self.digests += digest_of(text, [digest for digest, _ in pictures])
        self.sizes.extend((len(text.encode()) + len(json.dumps(sample.extra)), sum(size for _, size in pictures)))
        self.units.append(print_of_text(np.array(prints, np.uint64).tobytes()))
        self.contents.extend(prints)
        self.starts.append(len(self.contents))


def _bytes(value: object) -> np.ndarray:
    """JSON, uint8."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
