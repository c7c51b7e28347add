"""Checked samples, rendered once: token ids in memory, pictures decoded when a batch needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.batching import grouped
from dataset.formats import BadSample, DataError, Sample
from dataset.quarantine import Quarantine
from model.processing import Rendered, SampleError, VLMProcessor, collate

FULLY_DECODED = 2000  # pictures: up to so many are decoded before training; beyond, only headers are read
PICTURE = np.uint16(65535)  # stands for a whole span in the stored ids
GREY = 128  # of every pixel of a picture that cannot be decoded


@dataclass
class DataReport:
    """What the check found; printed at the start of every run."""

    samples: int = 0
    rows: int = 0  # fewer where neighbours share one
    pictures: int = 0
    trained_tokens: list[int] = field(default_factory=list)  # a sample each
    dropped: list[str] = field(default_factory=list)  # where and why
    bad: list[str] = field(default_factory=list)  # likewise

    def __str__(self) -> str:
        counts = self.trained_tokens or [0]
        line = (
            f"{self.samples:,} samples, {self.pictures:,} pictures, trained tokens a sample "
            f"{min(counts)} to {max(counts)}, mean {sum(counts) / len(counts):.1f}"
        )
        if self.rows < self.samples:
            line += f"; {self.rows:,} rows, as neighbours with the same beginning are computed together"
        if self.dropped:
            line += f"\ndropped {len(self.dropped):,} samples, the first: " + "; ".join(self.dropped[:3])
        if self.bad:
            line += f"\nleft out {len(self.bad):,} bad samples, the first: " + "; ".join(self.bad[:3])
        return line


class ConversationDataset(Dataset):
    """Rows by number: (Rendered, pixels or cached features of its pictures).

    Neighbouring samples that begin alike share a row (dataset.batching).
    Everything is checked and rendered here, before the first training step: lines, roles, tags against pictures,
    picture headers (and whole pictures where there are few), lengths. Samples too long for their pictures or left
    without a trained token are dropped and counted; anything else that is wrong goes to the quarantine, which counts it
    or raises DataError with file, line, cure.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int, quarantine: Quarantine | None = None
    ):
        """quarantine: what becomes of bad samples; without one the first is raised."""
        self.samples, self.processor, self.report = samples, processor, DataReport()
        quarantine = quarantine or Quarantine()
        self.features = None  # a dataset.feature_cache.FeatureCache, to be taken instead of pixels
        self.kept: list[int] = []  # of each row, the sample that its pictures come from
        columns, lengths = [], [0]
        for index, row in grouped(self._usable(max_seq_len, quarantine), max_seq_len):
            columns.append(_pack(row, processor.image_tokens))
            lengths.append(len(columns[-1][0]))
            self.kept.append(index)
        if not self.kept:
            raise DataError(f"no sample of {len(samples)} can be used; {self.report}")
        self.report.rows = len(self.kept)
        self.offsets = np.cumsum(lengths)
        self.ids, self.trained, self.branch = (np.concatenate(column) for column in zip(*columns, strict=True))

    def _usable(
        self, max_seq_len: int, quarantine: Quarantine
    ) -> Iterator[tuple[int, tuple[Path | bytes, ...], Rendered]]:
        """Number, pictures and rendered conversation of each sample that can be used."""
        for index in range(len(self.samples)):
            try:
                sample = self.samples[index]
                rendered, unfit = self._check(sample, max_seq_len)
            except BadSample as error:
                quarantine.leave_out(error, self.report.bad, index + 1)
                self.report.bad.append(str(error))
                continue
            if unfit:
                quarantine.drop(sample.where, unfit)
                self.report.dropped.append(f"{sample.where}: {unfit}")
                continue
            self.report.samples += 1
            self.report.pictures += len(sample.pictures)
            self.report.trained_tokens.append(sum(rendered.trained))
            yield index, sample.pictures, rendered
        quarantine.check(self.report.bad, len(self.report.bad), len(self.samples))

    def _check(self, sample: Sample, max_seq_len: int) -> tuple[Rendered, str]:
        """A sample rendered and cut to its length, and why it does not fit, if so. Raises BadSample."""
        try:
            if sample.text is not None:
                rendered = self.processor.render_text(sample.text, max_seq_len)
            else:
                rendered = self.processor.render(sample.messages)
        except SampleError as error:
            raise BadSample(sample.where, str(error)) from error
        try:
            rendered.truncate(max_seq_len)
        except SampleError as error:
            return rendered, str(error)
        if not any(rendered.trained[1:]):
            return rendered, f"no token of an answer within {max_seq_len} tokens"
        sample.open_pictures(decode=self.report.pictures + len(sample.pictures) <= FULLY_DECODED)
        return rendered, ""

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, pictures at their full span."""
        return np.diff(self.offsets) + self.pictures_a_row * (self.processor.image_tokens - 1)

    @property
    def pictures_a_row(self) -> np.ndarray:
        return np.add.reduceat((self.ids == PICTURE).astype(np.int64), self.offsets[:-1])

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
                where = self.samples[self.kept[index]].where
                rendered.unlearn(where, "a picture could not be decoded when --cache_features encoded it")
            return rendered, self.features.of_row(index)
        try:
            return rendered, self.pixels(index)
        except BadSample as error:
            rendered.unlearn(error.where, error.reason)
            return rendered, [self.grey()] * (sum(rendered.image_mask) // self.processor.image_tokens)

    def pixels(self, index: int) -> list[torch.Tensor]:
        """A row's pictures, uint8 [3, height, width] each. Raises BadSample."""
        pictures = self.samples[self.kept[index]].open_pictures()
        return [self.processor.pixels(picture) for picture in pictures]

    def grey(self) -> torch.Tensor:
        """What stands for a picture that cannot be decoded."""
        return torch.full((3, self.processor.image_size, self.processor.image_size), GREY, dtype=torch.uint8)

    def pictures_of(self, index: int) -> tuple[Path | bytes, ...]:
        return self.samples[self.kept[index]].pictures


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
    return collate(stripped)
