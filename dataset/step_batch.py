"""What a rank needs for one step, made by the processes that read: micro-batches, what they hold, what was damaged."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from model.config import IGNORE_INDEX
from model.processing import Rendered, collate


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


class Share(NamedTuple):
    """A rank's share of a step. A NamedTuple, because pinning the memory of one keeps its kind."""

    micro_batches: list[dict[str, torch.Tensor]]  # of model.processing.collate, without attention_mask
    counts: Counts
    damaged: list[tuple[str, str]]  # where and why: see dataset.quarantine


class Shares(Dataset):
    """Rows of a data set, given as the numbers of the rows of each micro-batch."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __getitem__(self, micro_batches: Sequence[Sequence[int]]) -> Share:
        batches, counts, damaged = [], Counts(), []
        for numbers in micro_batches:
            rows = [self.rows[number] for number in numbers]
            batch = collate(rows)
            del batch["attention_mask"]  # padding is on the right, where causal attention never looks
            counts = counts.plus(count(rows, batch["labels"]))
            damaged += [report for rendered, _ in rows for report in rendered.damaged]
            batches.append(batch)
        return Share(batches, counts, damaged)


def count(rows: Sequence[tuple[Rendered, list[torch.Tensor]]], labels: torch.Tensor) -> Counts:
    held = [conversations(rendered) for rendered, _ in rows]
    return Counts(
        rows=len(rows),
        conversations=sum(number for number, _ in held),
        tokens=sum(len(rendered.input_ids) for rendered, _ in rows),
        squared_lengths=sum(squares for _, squares in held),
        supervised=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        pictures=sum(len(pictures) for _, pictures in rows),
    )


def conversations(row: Rendered) -> tuple[int, int]:
    """How many a row holds, and the sum of their squared lengths: twice the pairs of tokens that see each other.

    A branch sees itself and its trunk, so it adds what the trunk's length squared lacks to both lengths' sum squared.
    """
    if not row.branch[-1]:  # all tokens are of one
        return 1, len(row.branch) ** 2
    numbers, first, sizes = np.unique(row.branch, return_index=True, return_counts=True)
    trunks = np.searchsorted(numbers, np.asarray(row.trunk)[first])  # of each branch, the place of its trunk
    grows = trunks != np.arange(len(numbers))
    above = np.where(grows, sizes[trunks], 0)
    return len(numbers) - len(set(trunks[grows])), int((sizes * (sizes + 2 * above)).sum())
