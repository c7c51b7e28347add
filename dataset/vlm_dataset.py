"""Checked samples, rendered once: token ids in memory, pictures decoded when a batch needs them."""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.batching import grouped
from dataset.formats import BadSample, DataError, Sample, Unreadable
from dataset.limits import PictureLimits
from dataset.quarantine import Quarantine
from dataset.token_cache import (
    BAD,
    DROPPED,
    HEADER,
    LINE,
    WHOLE,
    WORTH_KEEPING,
    Checked,
    Note,
    PicturesSeen,
    cache_path,
    read_or_render,
)
from model.messages import counted
from model.processing import Rendered, SampleError, VLMProcessor, collate

FULLY_DECODED = 2000  # pictures: up to so many are decoded before training; beyond, only headers are read
PICTURE = np.uint16(65535)  # stands for a whole span in the stored ids
SIGN_OF_LIFE = 100  # samples between two
GREY = 128  # of every pixel of a picture that cannot be decoded


@dataclass
class DataReport:
    """What the check found; printed at the start of every run."""

    conversations: int = 0  # or plain texts
    rows: int = 0  # fewer where neighbours share one
    pictures: int = 0
    trained_tokens: list[int] = field(default_factory=list)  # a conversation each
    dropped: list[str] = field(default_factory=list)  # where and why
    bad: list[str] = field(default_factory=list)  # likewise

    def leave_out(self, note: Note, quarantine: Quarantine, samples: int) -> None:
        """samples: of the file. Raises DataError as the quarantine does."""
        if note.kind == BAD:
            error = BadSample(note.where, note.reason)
            quarantine.leave_out(error, self.bad, samples)
            self.bad.append(str(error))
        else:
            quarantine.drop(note.where, note.reason)
            self.dropped.append(f"{note.where}: {note.reason}")

    def count(self, found: Checked) -> None:
        self.conversations, self.rows = len(found.counts), len(found.kept)
        self.trained_tokens, self.pictures = found.counts[:, 0].tolist(), int(found.counts[:, 1].sum())

    def __str__(self) -> str:
        counts = self.trained_tokens or [0]
        line = (
            f"{counted(self.conversations, 'conversations')}, {counted(self.pictures, 'pictures')}, "
            f"trained tokens a conversation {min(counts)} to {max(counts)}, mean {sum(counts) / len(counts):.1f}"
        )
        if self.rows < self.conversations:
            line += f"; {counted(self.rows, 'rows')}, as neighbours with the same beginning are computed together"
        if self.dropped:
            line += f"\ndropped {counted(len(self.dropped), 'samples')}, the first: " + "; ".join(self.dropped[:3])
        if self.bad:
            line += f"\nleft out {counted(len(self.bad), 'bad samples')}, the first: " + "; ".join(self.bad[:3])
        return line


class Check:
    """One look at every sample of a data file: what can be used is rendered, why the rest cannot is noted.

    report: to which the samples that are left out are added.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int, quarantine: Quarantine,
        report: DataReport,
    ):  # fmt: skip
        self.samples, self.processor, self.max_seq_len = samples, processor, max_seq_len
        self.quarantine, self.report, self.notes = quarantine, report, []
        self.pictures, self.sound = PicturesSeen(), set()  # all, and those that could be opened
        # Of each sample that can be used: its number, its trained tokens and its pictures; and those pictures' numbers.
        self.usable, self.trained, self.shows, self.shown = array("q"), array("q"), array("q"), array("q")

    def run(self, alive: Callable = lambda: None) -> Checked:
        """alive: called now and then. Raises DataError where too many samples are bad, or none is left."""
        columns, offsets, kept = (bytearray(), bytearray(), bytearray()), array("q", [0]), array("q")
        for index, row in grouped(self._usable(alive), self.max_seq_len):
            for column, values in zip(columns, _pack(row, self.processor.image_tokens), strict=True):
                column += values.tobytes()
            offsets.append(len(columns[1]))
            kept.append(index)
        if not kept:
            raise DataError(f"no sample of {len(self.samples)} can be used; {self.report}")
        ids, trained, branch = map(np.frombuffer, columns, (np.uint16, np.bool_, np.uint16))
        counts = np.array([self.trained, self.shows]).T.copy()
        begins_row = np.isin(self.usable, kept)
        shown = np.array(self.shown)[begins_row.repeat(self.shows)]
        starts = np.append(0, counts[begins_row, 1].cumsum())
        notes = np.frombuffer(json.dumps([astuple(note) for note in self.notes]).encode(), np.uint8)
        columns = ids, trained, branch, np.array(offsets), np.array(kept), shown, starts, counts
        return Checked(*columns, *self.pictures.columns(), notes)

    def _usable(self, alive: Callable) -> Iterator[tuple[int, tuple[int, ...], Rendered]]:
        """Number, numbers of the pictures and rendered conversation of each sample that can be used."""
        for index in range(len(self.samples)):
            if index % SIGN_OF_LIFE == 0:
                alive()
            self.looked_at = LINE
            try:
                sample = self.samples[index]
                shown = tuple(map(self.pictures.number, sample.pictures))
                rendered, unfit = self._check(sample, shown)
            except BadSample as error:
                again = self.looked_at if self.looked_at == LINE or isinstance(error, Unreadable) else ""
                self._leave_out(Note(BAD, index, error.where, error.reason, again))
                continue
            if unfit:
                self._leave_out(Note(DROPPED, index, sample.where, unfit))
                continue
            self.usable.append(index)
            self.trained.append(sum(rendered.trained))
            self.shows.append(len(shown))
            self.shown.extend(shown)
            yield index, shown, rendered
        self.quarantine.check(self.report.bad, len(self.report.bad), len(self.samples))

    def _leave_out(self, note: Note) -> None:
        self.notes.append(note)
        self.report.leave_out(note, self.quarantine, len(self.samples))

    def _check(self, sample: Sample, shown: tuple[int, ...]) -> tuple[Rendered, str]:
        """A sample rendered and cut to its length, and why it does not fit, if so. Raises BadSample."""
        self.looked_at = ""
        try:
            if sample.text is not None:
                rendered = self.processor.render_text(sample.text, self.max_seq_len)
            else:
                rendered = self.processor.render(sample.messages)
        except SampleError as error:
            raise BadSample(sample.where, str(error)) from error
        try:
            rendered.truncate(self.max_seq_len)
        except SampleError as error:
            return rendered, str(error)
        if not any(rendered.trained[1:]):
            return rendered, f"no token of an answer within {self.max_seq_len} tokens"
        decode = len(self.shown) + len(shown) <= FULLY_DECODED
        self.looked_at = WHOLE if decode else HEADER
        for place, number in enumerate(shown):
            if number not in self.sound:  # questions about one picture open it once
                sample.open_picture(place, decode)
                self.sound.add(number)
        return rendered, ""


class ConversationDataset(Dataset):
    """Rows by number: (Rendered, pixels or cached features of its pictures).

    Neighbouring samples that begin alike share a row (dataset.batching).
    Everything is checked and rendered here, before the first training step: lines, roles, tags against pictures,
    picture headers (and whole pictures where there are few), lengths. Samples too long for their pictures or left
    without a trained token are dropped and counted; anything else that is wrong goes to the quarantine, which counts it
    or raises DataError with file, line, cure. All that is found may be kept on disk (dataset.token_cache).
    """

    def __init__(
        self, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int,
        quarantine: Quarantine | None = None, folder: Path | None = None, say: Callable = print,
    ):  # fmt: skip
        """quarantine: what becomes of bad samples; without one the first is raised. folder: where to keep what is found
        in a file that read_samples opened; None: nowhere.
        """
        self.samples, self.processor, self.report = samples, processor, DataReport()
        self.features = None  # a dataset.feature_cache.FeatureCache, to be taken instead of pixels
        quarantine = quarantine or Quarantine()
        check = Check(samples, processor, max_seq_len, quarantine, self.report)
        if folder is None or len(samples) < WORTH_KEEPING:
            found = check.run()
        else:
            path = cache_path(folder, samples, processor, max_seq_len)
            found, was_read = read_or_render(path, samples, check.run, say)
            if was_read:
                say(f"rendered at an earlier start: {path}")
                for note in found.each_note():
                    self.report.leave_out(note, quarantine, len(samples))
                quarantine.check(self.report.bad, len(self.report.bad), len(samples))
        self.report.count(found)
        self._take(found)

    def _take(self, found: Checked) -> None:
        self.found, self.kept, self.offsets = found, found.kept, found.offsets
        self.ids, self.trained, self.branch = found.ids, found.trained, found.branch

    def __getstate__(self) -> dict:
        """To a process that reads and is not forked: it maps the columns of `found` again, and reports nothing."""
        of_found = ("kept", "offsets", "ids", "trained", "branch")
        state = {name: value for name, value in vars(self).items() if name not in of_found}
        return {**state, "report": DataReport()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._take(self.found)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, pictures at their full span."""
        return np.diff(self.offsets) + self.pictures_a_row * (self.processor.image_tokens - 1)

    @property
    def pictures_a_row(self) -> np.ndarray:
        return np.add.reduceat((self.ids == PICTURE).astype(np.int64), self.offsets[:-1])

    @property
    def conversations_a_row(self) -> np.ndarray:
        return np.maximum(np.maximum.reduceat(self.branch, self.offsets[:-1]), 1)  # see batching.share_prefix

    @property
    def rows_apart(self) -> int:
        """Rows that stand elsewhere in the file than an earlier row that begins with the same picture."""
        first = self.found.shown[self.found.starts[:-1][np.diff(self.found.starts) > 0]]
        begin_a_run = np.append(True, first[1:] != first[:-1])[: len(first)]
        return int(begin_a_run.sum()) - len(np.unique(first))

    def rendered(self, index: int) -> Rendered:
        """The stored conversation, its pictures' spans written out again."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        spans = self.ids[place] == PICTURE
        repeats = np.where(spans, self.processor.image_tokens, 1)
        image_mask = spans.repeat(repeats)
        ids = np.where(image_mask, self.processor.image_token_id, self.ids[place].astype(np.int64).repeat(repeats))
        trained, branch = self.trained[place].repeat(repeats), self.branch[place].repeat(repeats)
        return Rendered(ids.tolist(), trained.tolist(), image_mask.tolist(), branch.tolist(), [0] * len(ids))

    def __getitem__(self, index: int) -> tuple[Rendered, list[torch.Tensor]]:
        """Where a picture cannot be decoded, nothing of the row is learnt, see dataset.quarantine.DAMAGED."""
        rendered = self.rendered(index)
        if not any(rendered.image_mask):
            return rendered, []
        if self.features is not None:
            if self.features.is_damaged(index):
                rendered.unlearn(self.where(index), "a picture could not be decoded when --cache_features encoded it")
            return rendered, self.features.of_row(index)
        try:
            return rendered, self.pixels(index)
        except BadSample as error:
            rendered.unlearn(error.where, error.reason)
            return rendered, [self.grey()] * (sum(rendered.image_mask) // self.processor.image_tokens)

    def pixels(self, index: int) -> list[torch.Tensor]:
        """A row's pictures, uint8 [3, height, width] each. Raises BadSample."""
        return [self.processor.pixels(picture) for picture in self.pictured(index).open_pictures()]

    def pictured(self, index: int) -> Sample:
        """A row's pictures as they were checked, without its text: the data file may hold other lines by now."""
        numbers = self.found.shown_in(index).tolist()
        if any(map(self.found.is_embedded, numbers)):
            return self.samples[self.kept[index]]
        limits = getattr(self.samples, "limits", PictureLimits())
        pictures = tuple(Path(self.found.name(number)) for number in numbers)
        return Sample(self.where(index), [], pictures, max_pixels=limits.max_pixels)

    def grey(self) -> torch.Tensor:
        """What stands for a picture that cannot be decoded."""
        return torch.full((3, self.processor.image_size, self.processor.image_size), GREY, dtype=torch.uint8)

    def where(self, index: int) -> str:
        """File and line of a row's first sample, whatever has become of them since."""
        number = int(self.kept[index])
        return self.samples[number].where if isinstance(self.samples, list) else self.samples.where(number)


def _pack(rendered: Rendered, image_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids as uint16 with one entry a picture instead of its 196, which of them are trained, and their branches."""
    mask = np.array(rendered.image_mask)
    first_of_span = mask & (np.cumsum(mask) % image_tokens == 1 % image_tokens)
    ids = np.where(mask, PICTURE, np.array(rendered.input_ids, dtype=np.uint16))
    keep = ~mask | first_of_span
    return ids[keep].astype(np.uint16), np.array(rendered.trained)[keep], np.array(rendered.branch, np.uint16)[keep]


def text_only(rows: Sequence[Rendered]) -> dict[str, torch.Tensor]:
    """A batch of the same conversations without their pictures, to ask a decoder what it knows of the text."""
    stripped = []
    for row in rows:
        kept = [number for number, is_image in enumerate(row.image_mask) if not is_image]
        columns = (row.input_ids, row.trained, row.image_mask, row.branch, row.trunk)
        stripped.append((Rendered(*([column[number] for number in kept] for column in columns)), []))
    batch = collate(stripped)
    del batch["attention_mask"]  # branches say where a token looks; padding is on the right
    return batch
