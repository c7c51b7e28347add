"""Several data files in one run, `a.jsonl:0.7,b.parquet:0.3`: what was typed, and the files as one sequence.

Samples are numbered through all files, one after the other, so that everything behind the readers sees one file.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset.readers.joined import Joined
from dataset.samples import DataError, Sample
from model.messages import UserError

WEIGHTED = "--data_path"  # the flag that takes weights
WEIGHT = re.compile(r"(.*[^:]):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One of the files of a run."""

    path: str
    weight: float | None = None  # its share of an epoch's rows, of all sources together 1; None: each row once an epoch


def parse_sources(text: str, flag: str = WEIGHTED) -> list[Source]:
    """The files that a flag names: split at commas, each with a weight behind a colon or none of them with one.

    What exists as a path is one, whatever signs it holds. A single file has no use for a weight, and gets none.

    Raises:
        UserError: a weight is missing, not above 0 or of no use here; or a file stands twice or has no name.
    """
    sources = named_files(text, flag)
    if len(sources) == 1:
        return [Source(sources[0].path)]
    without = [source.path for source in sources if source.weight is None]
    if len(without) == len(sources):
        return sources
    if without:
        raise UserError(
            f"{flag} {text}: {without[0]} has no weight: give every file one, as in {without[0]}:0.5, or none"
        )
    if flag != WEIGHTED:
        raise UserError(f"{flag} {text}: its rows all count once, only {WEIGHTED} takes weights: leave them out")
    total = sum(source.weight for source in sources)
    return [replace(source, weight=source.weight / total) for source in sources]


def named_files(text: str, flag: str) -> list[Source]:
    """The files between the commas, each with the weight behind its colon, as it was typed, or None.

    What exists as a path is one, whatever signs it holds.

    Raises:
        UserError: a weight is not above 0, a file stands twice or has no name.
    """
    if os.path.exists(text) or not text:
        return [Source(text)]
    sources = [_parse(part.strip(), flag) for part in text.split(",")]
    paths = [source.path for source in sources]
    if not all(paths):
        raise UserError(f"{flag} {text}: a name between the commas is empty")
    if twice := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise UserError(f"{flag} {text}: {twice[0]} stands there twice: name it once, with a larger weight")
    return sources


def short_names(text: str, parts: int = 1) -> str:
    """What a flag named, for a person to read elsewhere: of each path the last parts."""
    return ", ".join("/".join(Path(part.strip()).parts[-parts:]) for part in text.split(","))


def _parse(part: str, flag: str) -> Source:
    """`path` or `path:weight`."""
    match = None if os.path.exists(part) else WEIGHT.fullmatch(part)
    if match is None:
        return Source(part)
    path, weight = match[1], float(match[2])
    if not 0 < weight < float("inf"):
        raise UserError(f"{flag} {part}: a weight must be a number above 0; leave the file out if it is not to be used")
    return Source(path, weight)


def open_sources(text: str, read: Callable[[str], Sequence[Sample]], flag: str = WEIGHTED) -> Sequence[Sample]:
    """What `read` makes of the file that a flag names; of several, one sequence after the other. Raises UserError."""
    sources = parse_sources(text, flag)
    if len(sources) == 1:
        return read(sources[0].path)
    return Sources(sources, [read(source.path) for source in sources])


class Sources(Joined):
    """The samples of several opened files, one file after the other."""

    def __init__(self, named: Sequence[Source], opened: Sequence[Sequence[Sample]]):
        super().__init__(opened)
        self.named = named

    @property
    def weights(self) -> tuple[float, ...]:
        """A share of each file; empty where every row is seen once an epoch."""
        return tuple(source.weight for source in self.named if source.weight is not None)

    def rows_of_each(self, numbers: np.ndarray) -> list[int]:
        """How many of these rows each file has. numbers: the first sample of each row, rising.

        Raises:
            DataError: a file has none.
        """
        rows = np.diff(np.searchsorted(numbers, self.bounds)).tolist()
        for source, samples, count in zip(self.named, self.parts, rows, strict=True):
            if not count:
                raise DataError(
                    f"none of the {len(samples):,} samples of {source.path} is left to learn from: they are bad, too "
                    "long or held back for validation, as quarantine.jsonl in the run's folder and --val_samples tell; "
                    "leave the file out, or mend it"
                )
        return rows
