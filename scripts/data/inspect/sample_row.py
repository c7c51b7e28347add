"""One sample as a step of training takes it: its row, with the neighbours that share it, or why it is left out."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.check import Check, DataReport, render_whole
from dataset.quarantine import Quarantine
from dataset.samples import BadSample, Sample
from dataset.vlm_dataset import ConversationDataset
from model.messages import UserError, counted, plain
from model.processing import Rendered, VLMProcessor
from model.views import UNCUT

MANY = 4000  # neighbours: beyond so many, somebody waits


@dataclass(frozen=True)
class SeenPicture:
    """One of a row's pictures, or a view of one that is cut."""

    name: str  # its file's, or a number where its bytes stand in the data; and which view
    first: int  # of its tokens in the row, counted from 0
    last: int
    pixels: torch.Tensor | None  # uint8 [3, image_size, image_size]; None: it cannot be opened


@dataclass(frozen=True)
class SampleRow:
    """What a step gets of a sample; of one that is left out, what it would have got but for that."""

    where: str  # file:line of the sample
    rendered: Rendered  # the whole row
    pictures: list[SeenPicture]
    conversations: list[str]  # file:line of each that shares the row, in the order of its branches
    max_seq_len: int
    refusal: str | None = None  # why training leaves the sample out
    cut: int = 0  # tokens of the sample's end that have no room

    @property
    def branch(self) -> int:
        """The number of the sample's own branch; 0 where it has the row for itself."""
        return self.conversations.index(self.where) + 1 if len(self.conversations) > 1 else 0


class Neighbours(Sequence):
    """Samples from one number to another of a data file."""

    def __init__(self, samples: Sequence[Sample], start: int, stop: int):
        self.samples, self.numbers = samples, range(max(0, start), min(stop, len(samples)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.numbers[index]]

    def where(self, index: int) -> str:
        return where_of(self.samples, self.numbers[index])

    def __getattr__(self, name: str) -> object:
        """What else a reader knows, as of the pictures that it takes."""
        return getattr(self.samples, name)


def where_of(samples: Sequence[Sample], index: int) -> str:
    return plain(samples.where(index))


def find_sample(samples: Sequence[Sample], path: str | Path, called: str) -> int:
    """The index of the sample that messages call `path:number`. Raises UserError where there is none.

    called: that number; or what messages end with, as a file's name or a key, where they name no numbers of one file.
    Of such data a number counts the samples from 1.
    """
    name, _, last = where_of(samples, len(samples) - 1).rpartition(":")
    of_one_file = name == plain(str(path)) and last.isdecimal() and last == str(int(last))
    number = int(called) if called.isdecimal() else 0
    if not of_one_file:
        for index in range(len(samples)):
            if re.search(rf"[:/\\]{re.escape(called)}$", where_of(samples, index)):
                return index
        if 1 <= number <= len(samples):
            return number - 1
    elif number:
        for index in range(min(number, len(samples)) - 1, -1, -1):  # blank lines count, and are no samples
            if where_of(samples, index) == f"{name}:{number}":
                return index
    count, first, last = counted(len(samples), "samples"), where_of(samples, 0), where_of(samples, len(samples) - 1)
    raise UserError(f"{path} has no sample {plain(called)}: it has {count}, from {first} to {last}")


def read_row(
    samples: Sequence[Sample], index: int, processor: VLMProcessor, max_seq_len: int, say: Callable = print
) -> SampleRow:
    """What training makes of a sample. say: gets a line where that takes long."""
    report = lenient(1)
    Check(Neighbours(samples, index, index + 1), processor, max_seq_len, report).run()
    if rejected := [*report.bad, *report.dropped]:
        return left_out(samples, index, processor, max_seq_len, rejected[0].reason)
    where, sample = where_of(samples, index), samples[index]
    data, number, conversations = row_with_neighbours(samples, index, processor, max_seq_len, say)
    row = data[number]
    return SampleRow(
        where, row.rendered, seen_pictures(sample, row.rendered, row.pictures, processor), conversations, max_seq_len,
        refusal=row.rejected[0].reason if row.rejected else None,
        cut=max(0, len(render_whole(sample, processor)) - max_seq_len),
    )  # fmt: skip


def lenient(samples: int) -> DataReport:
    """One that leaves bad samples out, however many there are."""
    return DataReport(samples, Quarantine(strict=False, max_share=1.0))


def row_with_neighbours(
    samples: Sequence[Sample], index: int, processor: VLMProcessor, max_seq_len: int, say: Callable
) -> tuple[ConversationDataset, int, list[str]]:
    """A data set of the sample's neighbourhood, the number of its row there, and where that row's samples stand.

    Rows are filled from the start of a file. They are the same from a later start on where a row before the sample's
    shows other pictures, as no row goes on there; so the neighbourhood grows until it holds such a row, and one behind.
    """
    before = after = 1
    while True:
        near = Neighbours(samples, index - before, index + 1 + after)
        data = ConversationDataset(near, processor, max_seq_len, lenient(len(near)).quarantine)
        row, conversations = row_of(data, where_of(samples, index))
        shown = [tuple(data.checked.shown_in(number)) for number in range(row + 1)]
        begins_exactly = near.numbers.start == 0 or len(set(shown)) > 1
        ends_exactly = near.numbers.stop == len(samples) or row < len(data) - 1
        if begins_exactly and ends_exactly:
            return data, row, conversations
        if len(near) > MANY:
            say(f"{counted(len(near), 'samples')} rendered to find the row's ends, as all show the same; going on")
        before, after = (before if begins_exactly else 2 * before), (after if ends_exactly else 2 * after)


def row_of(data: ConversationDataset, where: str) -> tuple[int, list[str]]:
    """The number of the row that holds a sample, and where all of the row's samples stand."""
    rejected = {one.where for one in data.checked.rejections()}
    usable = [place for place in map(data.samples.where, range(len(data.samples))) if place not in rejected]
    ends = np.cumsum(data.conversations_a_row)
    row = int(np.searchsorted(ends, usable.index(where), side="right"))
    return row, usable[ends[row] - data.conversations_a_row[row] : ends[row]]


def left_out(
    samples: Sequence[Sample], index: int, processor: VLMProcessor, max_seq_len: int, reason: str
) -> SampleRow:
    """As much of a sample as can be shown that training leaves out; nothing of it is cut."""
    where = where_of(samples, index)
    try:
        sample = samples[index]
        rendered = render_whole(sample, processor)
    except BadSample:
        return SampleRow(where, Rendered.of([]), [], [where], max_seq_len, reason)
    pixels = []
    for place in range(len(sample.pictures)):
        try:
            pixels += sample.open_views(place, processor)
        except BadSample:
            pixels += [None] * len(headings_of(sample, place, processor))
    return SampleRow(where, rendered, seen_pictures(sample, rendered, pixels, processor), [where], max_seq_len, reason)


def seen_pictures(
    sample: Sample, rendered: Rendered, pixels: Sequence[torch.Tensor | None], processor: VLMProcessor
) -> list[SeenPicture]:
    """Each view with its span: neighbouring spans touch, so they are told apart by their length."""
    spans = np.flatnonzero(rendered.image_mask).reshape(-1, processor.image_tokens)
    names = [
        plain(str(source)) if isinstance(source, Path) else f"picture {number} of {plain(sample.where)}"
        for number, source in enumerate(sample.pictures, 1)
    ]
    views = [
        f"{name}, {heading.rstrip(':')}" if heading else name
        for place, name in enumerate(names)
        for heading in headings_of(sample, place, processor)
    ]
    return [
        SeenPicture(name, int(span[0]), int(span[-1]), picture)
        for name, span, picture in zip(views, spans, pixels, strict=True)
    ]


def headings_of(sample: Sample, place: int, processor: VLMProcessor) -> tuple[str, ...]:
    """Of the views of a picture; as of one that is not cut, where it cannot be opened."""
    try:
        return sample.cut(place, processor.sight).headings
    except BadSample:
        return UNCUT.headings
