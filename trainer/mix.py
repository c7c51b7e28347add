"""Several sources with weights: how many rows each gives to an epoch, and which.

The draws of a source are counted through the whole run: draw k is row k % n of its permutation k // n, where n are its
rows. So a large source is walked through over the epochs before a row comes again, a small one is repeated as evenly as
can be, and all of it is a function of seed and epoch.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Subset

from dataset.batching import PackedRows
from dataset.sources import Sources
from model.messages import UserError, counted


@dataclass(frozen=True)
class Mix:
    """Rows are numbered source after source."""

    sizes: tuple[int, ...]  # rows of each source
    weights: tuple[float, ...]  # of each source, together 1

    @classmethod
    def of(cls, data: Subset, rows: Dataset) -> "Mix | None":
        """The mix that --data_path asks for; None where it gives no weights.

        rows: what a batch is made of, the data's own rows or packed ones.
        """
        sizes = rows.sizes if isinstance(rows, PackedRows) else rows_of_sources(data)
        return cls(tuple(sizes), data.dataset.samples.weights) if weights_of(data) else None

    def shares(self, rows: int) -> list[int]:
        """How many of so many rows come from each source: the weights, rounded by the largest remainder.

        Raises:
            UserError: a source would give none.
        """
        exact = [weight * rows for weight in self.weights]
        shares = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
        for source in by_remainder[: rows - sum(shares)]:
            shares[source] += 1
        if 0 in shares:
            weight = self.weights[shares.index(0)]
            raise UserError(
                f"an epoch has {rows:,} rows, of which a source with weight {weight:.3g} gives none: raise its weight "
                "in --data_path, or leave it out"
            )
        return shares

    def rows(self, epoch: int, count: int, seed: int) -> torch.Tensor:
        """Numbers of the rows that an epoch of `count` rows takes, source after source. Returns [count]."""
        parts, first = [], 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares(count), strict=True)):
            start, end = epoch * share, (epoch + 1) * share
            rounds = range(start // size, -(-end // size))
            draws = torch.cat([_permutation(size, seed, source, number) for number in rounds])
            parts.append(first + draws[start - rounds[0] * size : end - rounds[0] * size])
            first += size
        return torch.cat(parts)


def _permutation(size: int, seed: int, source: int, number: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {source} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(size, generator=generator)


# ---- what the data say


def weights_of(data: Subset) -> tuple[float, ...]:
    """The weights of the sources that a ConversationDataset was read from; empty where there are none."""
    samples = data.dataset.samples
    return samples.weights if isinstance(samples, Sources) else ()


def rows_of_sources(data: Subset) -> list[int]:
    """How many rows, one after the other, are each source's. Raises DataError where one has none left."""
    samples = data.dataset.samples
    return samples.rows_of_each(data.dataset.kept[data.indices]) if isinstance(samples, Sources) else [len(data)]


def how_often(data: Subset, mix: Mix | None, rows_per_epoch: int) -> list[str]:
    """For each of several sources a line to print: its rows, its weight, and how often an epoch sees them."""
    samples = data.dataset.samples
    if not isinstance(samples, Sources):
        return []
    paths = [source.path for source in samples.named]
    if mix is None:
        each = zip(paths, rows_of_sources(data), strict=True)
        return [f"{path}: {counted(rows, 'rows')}, seen once an epoch" for path, rows in each]
    lines = []
    things = "rows" if sum(mix.sizes) == len(data) else "packed rows"
    for path, rows, weight, share in zip(paths, mix.sizes, mix.weights, mix.shares(rows_per_epoch), strict=True):
        often = f"{share / rows:.2f}" if share < rows else f"{share / rows:.1f}"
        lines.append(f"{path}: {counted(rows, things)}, weight {weight:.3g}, seen {often} times an epoch")
    return lines
