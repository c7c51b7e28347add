"""Several readers as one: their samples are numbered through, one reader after the other."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from dataset.readers.reader import Reader
from dataset.samples import Sample


class Joined(Sequence):
    """parts: opened with the same options; each keeps its own format."""

    def __init__(self, parts: Sequence[Reader]):
        self.parts, self.options = parts, parts[0].options
        self.bounds = list(accumulate(map(len, parts), initial=0))  # of each the first number; at the end all

    def __len__(self) -> int:
        return self.bounds[-1]

    def _place(self, index: int) -> tuple[Reader, int]:
        """The part that a sample is of, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.bounds, index) - 1
        return self.parts[part], int(index) - self.bounds[part]

    def __getitem__(self, index: int) -> Sample:
        part, number = self._place(index)
        return part[number]

    def where(self, index: int) -> str:
        part, number = self._place(index)
        return part.where(number)

    def identity(self) -> list:
        """What tells this data from other data."""
        return ["joined", *(part.identity() for part in self.parts)]

    def recognise(self) -> "Joined":
        """Settle each part's format. Raises DataError where nothing tells one."""
        for part in self.parts:
            part.recognise()
        return self

    def describe(self) -> str:
        first, *others = [part.describe() for part in self.parts]
        return first + (f", and {len(others):,} more such files" if others else "")
