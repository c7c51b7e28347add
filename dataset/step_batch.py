"""What a rank needs for one step, made by the processes that read: micro-batches, what they hold, what was rejected."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.batching import Row
from dataset.samples import Rejected
from model.config import END_OF_TEXT_ID, IGNORE_INDEX
from model.processing import Rendered, collate_training


class Counts(NamedTuple):
    """What was learnt from, without padding."""

    rows: int = 0
    conversations: int = 0  # more than rows where these are shared or packed
    tokens: int = 0
    squared_lengths: int = 0  # sum over conversations; what several share counts once
    supervised: int = 0  # tokens with a label
    pictures: int = 0

    def plus(self, other: Sequence[float]) -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class StepBatch(NamedTuple):
    """A rank's part of a step. A NamedTuple, because pinning the memory of one keeps its kind."""

    micro_batches: list[dict[str, torch.Tensor]]  # of model.processing.collate_training
    counts: Counts
    rejected: list[Rejected]  # pictures that could not be decoded: see dataset.quarantine


class StepBatches(Dataset):
    """Rows of a data set, asked for by the numbers of the rows of each micro-batch."""

    def __init__(self, rows: Dataset, padding_id: int = END_OF_TEXT_ID):
        self.rows, self.padding_id = rows, padding_id

    def __getitem__(self, micro_batches: Sequence[Sequence[int]]) -> StepBatch:
        step = StepBatch([], Counts(), [])
        for numbers in micro_batches:
            rows = [self.rows[number] for number in numbers]
            batch = collate_training(rows, self.padding_id)
            step.micro_batches.append(batch)
            step.rejected.extend(rejected for row in rows for rejected in row.rejected)
            step = step._replace(counts=step.counts.plus(count(rows, batch["labels"])))
        return step


def count(rows: Sequence[Row], labels: torch.Tensor) -> Counts:
    held = [conversations(row.rendered) for row in rows]
    return Counts(
        rows=len(rows),
        conversations=sum(number for number, _ in held),
        tokens=sum(len(row.rendered) for row in rows),
        squared_lengths=sum(squares for _, squares in held),
        supervised=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        pictures=sum(len(row.pictures) for row in rows),
    )


def conversations(row: Rendered) -> tuple[int, int]:
    """How many a row holds, and the sum of their squared lengths: twice the pairs of tokens that see each other.

    A branch sees itself and its shared prefix, so it adds what the prefix's length squared lacks to both lengths' sum
    squared.
    """
    numbers, first, sizes = np.unique(row.branch, return_index=True, return_counts=True)
    prefixes = np.searchsorted(numbers, row.shared_prefix[first])  # of each branch, the place of its prefix
    continues = prefixes != np.arange(len(numbers))
    before = np.where(continues, sizes[prefixes], 0)
    return len(numbers) - len(set(prefixes[continues])), int((sizes * (sizes + 2 * before)).sum())
