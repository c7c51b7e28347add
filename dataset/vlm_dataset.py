"""Checked samples, rendered once: token ids in memory, pictures decoded when a batch needs them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.batching import Row
from dataset.check import Check, CheckedData, DataReport
from dataset.options import ReadOptions
from dataset.quarantine import Quarantine
from dataset.samples import DAMAGED, BadSample, DataError, Rejected, Sample
from dataset.token_cache import WORTH_KEEPING, TokenCache
from model.pictures import SampleError
from model.processing import Rendered, VLMProcessor, collate_training

GREY = 128  # of every pixel of a picture that cannot be decoded


class ConversationDataset(Dataset):
    """Rows by number, each with pixels or cached features of its pictures.

    Neighbouring samples that begin alike share a row (dataset.batching).
    Everything is checked and rendered here, before the first training step (dataset.check): lines, roles, tags against
    pictures, picture headers (and pictures to their end where there are few), lengths. Samples too long for their
    pictures or left without a trained token are dropped and counted; anything else that is wrong goes to the
    quarantine, which counts it or raises DataError with file, line, cure. What the check gives may be kept on disk.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: VLMProcessor, max_seq_len: int,
        quarantine: Quarantine | None = None, folder: Path | None = None, say: Callable = print,
    ):  # fmt: skip
        """quarantine: what becomes of bad samples; without one the first is raised. folder: where the check of a file
        that read_samples opened is kept; None: nowhere.
        """
        self.samples, self.processor = samples, processor
        self.features = None  # a dataset.feature_cache.FeatureCache, to be used instead of pixels
        self.report = DataReport(len(samples), quarantine or Quarantine())
        check = Check(samples, processor, max_seq_len, self.report)
        if folder is None or len(samples) < WORTH_KEEPING:
            self.checked = check.run()
            self.report.finish(self.checked)
        else:
            self.checked = self._cached(TokenCache(folder, samples, processor, max_seq_len), check, say)

    def _cached(self, cache: TokenCache, check: Check, say: Callable) -> CheckedData:
        """What the cache holds; if there is nothing, the check, which is stored."""
        checked = cache.load(say)
        if checked is None:
            with cache.turn(say) as show_life:
                checked = cache.load()  # of the process that had its turn before
                if checked is None:
                    checked = check.run(show_life)
                    self.report.finish(checked)
                    return cache.store(checked, say)
        say(f"rendered at an earlier start: {cache.path}")
        for rejected in checked.rejections():
            self.report.reject(rejected)
        self.report.finish(checked)
        return checked

    def __getstate__(self) -> dict:
        """To a process that reads, which reports nothing."""
        return {**vars(self), "report": DataReport()}

    # what of the checked data others use: see CheckedData
    ids = property(lambda self: self.checked.ids)
    trained = property(lambda self: self.checked.trained)
    branch = property(lambda self: self.checked.branch)
    offsets = property(lambda self: self.checked.offsets)
    kept = property(lambda self: self.checked.kept)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, pictures at their full span."""
        return np.diff(self.offsets) + self.views_a_row * (self.processor.image_tokens - 1)

    @property
    def views_a_row(self) -> np.ndarray:
        """Spans of each row: as many as it shows pictures, where none is cut."""
        return np.diff(self.checked.first_views[self.checked.starts])

    @property
    def conversations_a_row(self) -> np.ndarray:
        return np.maximum(np.maximum.reduceat(self.branch, self.offsets[:-1]), 1)  # see batching.share_prefix

    @property
    def rows_apart(self) -> int:
        """Rows that stand elsewhere in the file than an earlier row that begins with the same picture."""
        starts = self.checked.starts
        first = self.checked.shown[starts[:-1][np.diff(starts) > 0]]  # the first picture of each row that has any
        begin_a_run = np.append(True, first[1:] != first[:-1])[: len(first)]
        return int(begin_a_run.sum()) - len(np.unique(first))

    def rendered(self, index: int) -> Rendered:
        """The stored row, with all placeholders of its pictures."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        is_picture = self.ids[place] == self.checked.picture_mark
        repeats = np.where(is_picture, self.processor.image_tokens, 1)
        image_mask = is_picture.repeat(repeats)
        ids = np.where(image_mask, self.processor.image_token_id, self.ids[place].astype(np.int64).repeat(repeats))
        branch = self.branch[place].astype(np.int64).repeat(repeats)
        return Rendered(ids, self.trained[place].repeat(repeats), image_mask, branch, np.zeros_like(ids))

    def __getitem__(self, index: int) -> Row:
        """Where a picture cannot be decoded, nothing of the row is learnt, see dataset.quarantine."""
        rendered, rejected = self.rendered(index), None
        if not rendered.image_mask.any():
            return Row(rendered, [])
        if self.features is not None:
            pictures = self.features.of_row(index)
            if self.features.is_damaged(index):
                reason = "a picture could not be decoded when --cache_features encoded it"
                rejected = Rejected(self.where(index), reason, DAMAGED)
        else:
            try:
                pictures = self.pixels(index)
            except BadSample as error:
                pictures = [self.grey()] * int(self.views_a_row[index])
                rejected = error.rejected._replace(kind=DAMAGED)
        try:
            self.processor.check_pictures(rendered, len(pictures))
        except SampleError as error:  # its source has changed since it was checked
            raise DataError(f"{self.where(index)}: {error}; start again with data that stay as they are") from error
        if rejected is None:
            return Row(rendered, pictures)
        return Row(replace(rendered, trained=np.zeros_like(rendered.trained)), pictures, (rejected,))

    def pixels(self, index: int) -> list[torch.Tensor]:
        """The views of a row's pictures, uint8 [3, height, width] each. Raises BadSample."""
        sample = self.pictured(index)
        return [view for place in range(len(sample.pictures)) for view in sample.open_views(place, self.processor)]

    def pictured(self, index: int) -> Sample:
        """A row's pictures as they were checked, without its text: the data file may hold other lines by now."""
        numbers = self.checked.shown_in(index).tolist()
        if any(map(self.checked.is_embedded, numbers)):
            return self.samples[self.kept[index]]
        options = getattr(self.samples, "options", ReadOptions())
        pictures = tuple(Path(self.checked.name(number)) for number in numbers)
        return Sample(self.where(index), [], pictures, max_pixels=options.max_pixels)

    def grey(self) -> torch.Tensor:
        """What stands for a picture that cannot be decoded."""
        return torch.full((3, self.processor.image_size, self.processor.image_size), GREY, dtype=torch.uint8)

    def where(self, index: int) -> str:
        """File and line of a row's first sample, whatever has become of them since."""
        number = int(self.kept[index])
        return self.samples[number].where if isinstance(self.samples, list) else self.samples.where(number)


def text_only(rows: Sequence[Rendered]) -> dict:
    """A batch of the same conversations without their pictures, to ask a decoder what it knows of the text."""
    return collate_training([(row[~row.image_mask], []) for row in rows])
