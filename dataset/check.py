"""The check of a data file before training: every sample is read and rendered, every picture opened, once.

What can be used becomes the rows of CheckedData; what cannot is rejected, with its place and the reason.
"""

import hashlib
import io
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.batching import grouped
from dataset.quarantine import Quarantine
from dataset.samples import BAD, DROPPED, BadSample, DataError, Rejected, Sample
from model.messages import counted
from model.pictures import SampleError, UnreadableFile
from model.processing import Rendered, VLMProcessor
from model.views import UNCUT, Sight

FULLY_DECODED = 2000  # pictures: up to so many are decoded before training; beyond, only headers are read
SIGN_OF_LIFE = 100  # samples between two
BLOCK = 4096  # bytes of a picture that are read for its print, three times
ABSENT, EMBEDDED = (-1, -1), (-2, -2)  # stamps of pictures that are no files


@dataclass
class DataReport:
    """What has become of the samples of a data file; printed at the start of every run."""

    samples: int = 0  # of the file
    quarantine: Quarantine = field(default_factory=Quarantine, compare=False)
    conversations: int = 0  # that can be used, or plain texts
    rows: int = 0  # fewer where neighbours share one
    pictures: int = 0
    trained_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False)  # a conversation
    dropped: list[Rejected] = field(default_factory=list)
    bad: list[Rejected] = field(default_factory=list)

    def reject(self, rejected: Rejected) -> None:
        """Raises DataError as the quarantine does."""
        (self.bad if rejected.kind == BAD else self.dropped).append(rejected)
        self.quarantine.reject(rejected, self.bad, self.samples)

    def finish(self, checked: "CheckedData") -> None:
        """Count what can be used. Raises DataError where too many samples are bad, or none is left."""
        self.quarantine.refuse_too_many(self.bad, len(self.bad), self.samples)
        if not len(checked.kept):
            raise DataError(f"no sample of {self.samples} can be used; {self}")
        self.conversations, self.rows = len(checked.counts), len(checked.kept)
        self.trained_tokens, self.pictures = checked.counts[:, 0], int(checked.counts[:, 1].sum())

    def __str__(self) -> str:
        counts = self.trained_tokens if len(self.trained_tokens) else np.zeros(1, np.int64)
        line = (
            f"{counted(self.conversations, 'conversations')}, {counted(self.pictures, 'pictures')}, "
            f"trained tokens a conversation {counts.min()} to {counts.max()}, mean {counts.mean():.1f}"
        )
        if self.rows < self.conversations:
            line += f"; {counted(self.rows, 'rows')}, as neighbours with the same beginning are computed together"
        if self.dropped:
            line += f"\ndropped {counted(len(self.dropped), 'samples')}, the first: "
            line += "; ".join(map(str, self.dropped[:3]))
        if self.bad:
            line += f"\nleft out {counted(len(self.bad), 'bad samples')}, the first: "
            line += "; ".join(map(str, self.bad[:3]))
        return line


@dataclass
class CheckedData:
    """All that is known of a data file once it was checked, however many bad samples a run allows.

    Rows stand one after the other; a picture's placeholders are one entry, picture_mark.
    """

    ids: np.ndarray  # uint16 [tokens], uint32 where the tokenizer has more ids than that holds
    trained: np.ndarray  # bool [tokens]
    branch: np.ndarray  # uint16 [tokens]
    offsets: np.ndarray  # int64 [rows + 1], where each row begins
    kept: np.ndarray  # int64 [rows], the sample that the row's pictures come from
    shown: np.ndarray  # int64 [pictures of all rows], their numbers, as `names` and `stamps` count them
    starts: np.ndarray  # int64 [rows + 1], where each row's begin in `shown`
    counts: np.ndarray  # int64 [samples that can be used, 2]: trained tokens, pictures
    names: np.ndarray  # bytes [pictures that were looked at]: the path of each, or the sha256 of its content
    stamps: np.ndarray  # int64 [pictures that were looked at, 2]: bytes and time of change; ABSENT, EMBEDDED
    views: np.ndarray  # uint16 [pictures that were looked at]: into how many each is cut, 1 where it is not
    prints: np.ndarray  # uint64 [pictures that were looked at]: print_of each; 0 where it could not be opened
    rejected: np.ndarray  # uint8: JSON, the fields of a Rejected each
    to_recheck: np.ndarray  # int64 [rejected], the sample, where its reason may go away by itself; else -1

    @property
    def picture_mark(self) -> int:
        """What stands for a picture's placeholders in `ids`: no token's id."""
        return picture_mark(self.ids.dtype)

    def shown_in(self, row: int) -> np.ndarray:
        """The numbers of a row's pictures."""
        return self.shown[self.starts[row] : self.starts[row + 1]]

    @cached_property
    def first_views(self) -> np.ndarray:
        """int64 [pictures of all rows + 1]: how many views stand before those of each."""
        return np.append(0, self.views[self.shown].cumsum(dtype=np.int64))

    def name(self, number: int) -> str:
        """A picture's path, or the sha256 of its content."""
        return os.fsdecode(self.names[number])

    def is_embedded(self, number: int) -> bool:
        return tuple(self.stamps[number].tolist()) == EMBEDDED

    def rejections(self) -> list[Rejected]:
        return [Rejected(*values) for values in json.loads(self.rejected.tobytes())]

    def change(self, samples: Sequence[Sample]) -> str | None:
        """What the check would see otherwise today: a picture, or a reason to reject a sample; None: nothing."""
        for number in np.flatnonzero((self.stamps != EMBEDDED).any(1)):
            if tuple(self.stamps[number].tolist()) != stamp_of(self.names[number]):
                return f"{self.name(number)} has changed"
        for rejected, number in zip(self.rejections(), self.to_recheck.tolist(), strict=True):
            if number >= 0 and not _is_rejected_again(rejected, samples, number):
                return f"{rejected.where} has changed"
        return None


def _is_rejected_again(rejected: Rejected, samples: Sequence[Sample], number: int) -> bool:
    try:
        samples[number].open_pictures()
    except BadSample as error:
        return error.rejected == rejected
    return False


class Check:
    """One look at every sample of a data file."""

    def __init__(self, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int, report: DataReport):
        """report: gets the samples that are rejected, and may raise DataError."""
        self.samples, self.processor, self.max_seq_len, self.report = samples, processor, max_seq_len, report
        self.pictures = PicturesSeen()
        self.used = array("q")  # of each sample that can be used: its number, its trained tokens, its pictures
        self.shown = array("q")  # the numbers of those pictures
        self.rejected: list[Rejected] = []
        self.to_recheck = array("q")

    def run(self, show_life: Callable = lambda: None) -> CheckedData:
        """show_life: called now and then."""
        kind = stored_as(self.processor)
        ids, trained, branch = bytearray(), bytearray(), bytearray()
        offsets, kept = array("q", [0]), array("q")
        for number, row in grouped(self._usable(show_life), self.max_seq_len):
            row = _one_token_a_picture(row, self.processor.image_tokens, picture_mark(kind))
            ids += row.input_ids.astype(kind).tobytes()
            trained += row.trained.tobytes()
            branch += row.branch.astype(np.uint16).tobytes()
            offsets.append(len(trained))
            kept.append(number)
        used = np.array(self.used, np.int64).reshape(-1, 3)
        begins_row, pictures = np.isin(used[:, 0], kept), used[:, 2]
        return CheckedData(
            ids=np.frombuffer(ids, kind),
            trained=np.frombuffer(trained, np.bool_),
            branch=np.frombuffer(branch, np.uint16),
            offsets=np.array(offsets),
            kept=np.array(kept),
            shown=np.array(self.shown, np.int64)[begins_row.repeat(pictures)],
            starts=np.append(0, pictures[begins_row].cumsum()),
            counts=used[:, 1:].copy(),
            rejected=np.frombuffer(json.dumps(self.rejected).encode(), np.uint8),
            to_recheck=np.array(self.to_recheck, np.int64),
            **self.pictures.columns(),
        )

    def _usable(self, show_life: Callable) -> Iterator[tuple[int, tuple[int, ...], Rendered]]:
        """Number, numbers of the pictures and rendered conversation of each sample that can be used."""
        for number in range(len(self.samples)):
            if number % SIGN_OF_LIFE == 0:
                show_life()
            sample = None
            try:
                sample = self.samples[number]
                shown = tuple(map(self.pictures.number, sample.pictures))
                headings = self.pictures.headings_of(sample, shown, self.processor.sight)
                rendered = fitted(render_whole(sample, self.processor, headings), sample.where, self.max_seq_len)
                self.pictures.open(sample, shown, decode=len(self.shown) + len(shown) <= FULLY_DECODED)
            except BadSample as error:
                # Links and rights are mended without a trace in the data file or in the pictures that it names.
                recheck = sample is None or isinstance(error.__cause__, UnreadableFile)
                self.rejected.append(error.rejected)
                self.to_recheck.append(number if recheck else -1)
                self.report.reject(error.rejected)
                continue
            self.used.extend((number, int(rendered.trained.sum()), len(shown)))
            self.shown.extend(shown)
            yield number, shown, rendered


def render_whole(sample: Sample, processor: VLMProcessor, headings: Sequence[Sequence[str]] | None = None) -> Rendered:
    """All of a sample's tokens. headings: of its pictures' views, where they are known. Raises BadSample."""
    try:
        if sample.text is not None:
            return processor.render_text(sample.text)
        if headings is None:
            headings = [sample.cut(place, processor.sight).headings for place in range(len(sample.pictures))]
        return processor.render(sample.messages, headings=headings)
    except SampleError as error:
        raise BadSample(sample.where, str(error)) from error


def fitted(rendered: Rendered, where: str, max_seq_len: int) -> Rendered:
    """A sample's tokens cut to their length. Raises BadSample, DROPPED, where nothing to learn would be left."""
    try:
        if len(rendered) > max_seq_len:
            rendered = rendered.truncated(max_seq_len)
    except SampleError as error:
        raise BadSample(where, str(error), DROPPED) from error
    if not rendered.trained[1:].any():
        cure = "raise --max_seq_len, or give it an answer"
        raise BadSample(where, f"no token of an answer within {max_seq_len} tokens: {cure}", DROPPED)
    return rendered


class PicturesSeen:
    """Distinct pictures, numbered as they come; of their bytes only a hash is kept."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # by path, or the sha256 of the bytes
        self.stamps = array("q")  # two numbers a picture
        self.prints = array("Q")  # 0 until it is open
        self.sound = bytearray()  # 1: it could be opened
        self.headings: list[tuple[str, ...] | None] = []  # of its views; None until they were asked for

    def number(self, picture: Path | bytes) -> int:
        embedded = isinstance(picture, bytes)
        name = hashlib.sha256(picture).hexdigest() if embedded else str(picture)
        if name not in self.numbers:
            self.numbers[name] = len(self.numbers)
            self.stamps.extend(EMBEDDED if embedded else stamp_of(name))
            self.prints.append(0)
            self.sound.append(False)
            self.headings.append(None)
        return self.numbers[name]

    def headings_of(self, sample: Sample, numbers: Sequence[int], sight: Sight) -> list[tuple[str, ...]]:
        """Of the views of a sample's pictures, by their headers. Raises BadSample."""
        for place, number in enumerate(numbers):
            if self.headings[number] is None:
                self.headings[number] = sample.cut(place, sight).headings
        return [self.headings[number] for number in numbers]

    def open(self, sample: Sample, numbers: Sequence[int], decode: bool) -> None:
        """Open a sample's pictures, but those that were sound already. Raises BadSample."""
        for place, number in enumerate(numbers):
            if not self.sound[number]:  # questions about one picture open it once
                sample.open_picture(place, decode)
                self.prints[number] = _print(sample, place)
                self.sound[number] = True

    def columns(self) -> dict[str, np.ndarray]:
        """Of CheckedData."""
        longest = max((len(os.fsencode(name)) for name in self.numbers), default=1)
        names = np.fromiter(map(os.fsencode, self.numbers), f"S{longest}", len(self.numbers))
        stamps = np.array(self.stamps, np.int64).reshape(-1, 2)
        views = np.array([len(headings or UNCUT.headings) for headings in self.headings], np.uint16)
        return {"names": names, "stamps": stamps, "views": views, "prints": np.array(self.prints, np.uint64)}


def _print(sample: Sample, place: int) -> int:
    """Of a picture that could be opened a moment ago. Raises BadSample where it no longer can."""
    try:
        return print_of(sample.pictures[place])
    except OSError as error:
        unreadable = UnreadableFile(error)
        raise BadSample(sample.where, f"{sample.pictures[place]}: {unreadable}") from unreadable


def print_of(picture: Path | bytes) -> int:
    """64 bits of a hash of a picture's size and of its first, middle and last BLOCK: cheap, however large it is.

    The same bytes always have the same print. Different ones may share one, where they differ only in between: they
    are then kept together, which does no harm. Raises OSError.
    """
    with picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture) as file:
        size = file.seek(0, io.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for place in (0, (size - BLOCK) // 2, size - BLOCK):
            file.seek(max(0, place))
            digest.update(file.read(BLOCK))
    return int.from_bytes(digest.digest()[:8], "little")


def stamp_of(file: str | bytes | int) -> tuple[int, int]:
    """What changes where a picture's file does. file: a path, or the number of an open one."""
    try:
        facts = os.stat(file)
    except OSError:
        return ABSENT
    return facts.st_size, facts.st_mtime_ns


def stored_as(processor: VLMProcessor) -> np.dtype:
    """Of stored ids: two bytes where the tokenizer's fit into them beside the mark of a picture, or four."""
    largest = max(processor.tokenizer.get_vocab().values())
    return np.dtype(np.uint16 if largest < picture_mark(np.uint16) else np.uint32)


def picture_mark(kind: np.dtype) -> int:
    """The largest number of a kind of stored ids, which stands for a picture's placeholders."""
    return int(np.iinfo(kind).max)


def _one_token_a_picture(row: Rendered, image_tokens: int, mark: int) -> Rendered:
    """With the mark in the place of each picture's placeholders."""
    placeholders = row.image_mask
    begins_picture = placeholders & (np.cumsum(placeholders) % image_tokens == 1 % image_tokens)
    return replace(row, input_ids=np.where(placeholders, mark, row.input_ids))[~placeholders | begins_picture]
