"""Which sample goes into which shard, in which order: a function of a Survey and the options alone.

So whoever goes on after a stop writes what would have been written without it, to the bit.
"""

from dataclasses import dataclass

import numpy as np

from dataset.split import groups_of, hold_back, mixed
from model.messages import UserError
from scripts.data.prepare.first_look import Survey

MEGABYTE = 1_000_000
MOST = 2  # times the samples that --split asks for: a group of more is passed over


@dataclass(frozen=True)
class Options:
    """What decides where samples go; see scripts/prepare_data.py."""

    shuffle: bool = False
    seed: int = 42
    split: float = 0.0  # of the samples
    dedup: str = "none"  # or "exact"
    shard_mb: int = 256  # about


@dataclass(frozen=True)
class Shard:
    name: str
    rows: np.ndarray  # int64 [rows], places in the survey, in the order of the shard
    size: int  # bytes, about


@dataclass(frozen=True)
class Plan:
    shards: list[Shard]
    duplicates: np.ndarray  # int64 [duplicates, 2], places in the survey: left out, and which one is as good
    held_out: int  # samples


def make_plan(survey: Survey, options: Options) -> Plan:
    """Raises UserError where no sample can be held out."""
    places = np.arange(len(survey.numbers))
    first = first_alike(survey.digests)
    duplicates = np.stack([places, first], 1)[first != places]
    kept = first == places if options.dedup == "exact" else places >= 0
    held = _held_out(survey, kept, options)
    shards = []
    for name, rows in (("train", places[kept & ~held]), ("held_out", places[kept & held])):
        shards += _shards(name, _ordered(survey, rows, options), survey, options)
    return Plan(shards, duplicates, int(held.sum()))


def first_alike(digests: np.ndarray) -> np.ndarray:
    """For each sample the first that is equal, itself perhaps: int64 [samples]."""
    keys = np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _held_out(survey: Survey, kept: np.ndarray, options: Options) -> np.ndarray:
    """bool [usable]; of what is not kept, too, where it shows a picture that is held out."""
    if not options.split:
        return np.zeros(len(kept), bool)
    wanted = max(1, round(options.split * int(kept.sum())))
    groups = groups_of(survey.contents, survey.starts)
    held = hold_back(survey.contents, survey.starts, groups, wanted, MOST * wanted, options.seed)
    if not held.any():
        raise UserError(
            f"--split {options.split:g} would hold out about {wanted:,} of {len(kept):,} samples, but the smallest "
            f"group about the same pictures has {np.bincount(groups).min():,}: give a larger share, or 0"
        )
    return held & kept


def _ordered(survey: Survey, rows: np.ndarray, options: Options) -> np.ndarray:
    """As they stand in the data, or shuffled; what shows the same pictures is then together, as it stood."""
    if not options.shuffle:
        return rows
    return rows[np.lexsort((rows, mixed(survey.units[rows], options.seed)))]


def _shards(name: str, rows: np.ndarray, survey: Survey, options: Options) -> list[Shard]:
    """Rows cut where a shard is full, but never between neighbours that show the same pictures."""
    if not len(rows):
        return []
    begins = np.append(True, survey.units[rows][1:] != survey.units[rows][:-1])
    sizes = survey.sizes[rows, 0] + np.where(begins, survey.sizes[rows, 1], 0)  # a picture is stored once
    before = np.cumsum(sizes) - sizes
    shard = (before // (options.shard_mb * MEGABYTE))[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    parts = list(zip(np.split(rows, cuts), np.split(sizes, cuts), strict=True))
    return [
        Shard(f"{name}-{number:05d}-of-{len(parts):05d}.parquet", part, int(size.sum()))
        for number, (part, size) in enumerate(parts)
    ]
