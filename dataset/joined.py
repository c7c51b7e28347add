"""Several sources read as one, in turn."""

from collections.abc import Sequence

import numpy as np

from dataset.reader import Reader
from dataset.samples import Sample


class Joined(Sequence):
    """bounds: the number of each source's first sample, and after the last; sources keep their own formats."""

    def __init__(self, sources: Sequence[Reader]):
        self.sources, self.options = list(sources), sources[0].options
        self.bounds = np.cumsum([0, *map(len, self.sources)])

    def _at(self, index: int) -> tuple[Reader, int]:
        """The source of a sample, and its number there."""
        number = int(np.searchsorted(self.bounds, index, "right")) - 1
        return self.sources[number], int(index - self.bounds[number])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        source, number = self._at(index)
        return source[number]

    def where(self, index: int) -> str:
        source, number = self._at(index)
        return source.where(number)

    def identity(self) -> list:
        return [source.identity() for source in self.sources]

    def recognise(self) -> "Joined":
        for source in self.sources:
            source.recognise()
        return self

    def describe(self) -> str:
        first, *others = [source.describe() for source in self.sources]
        return first + (f", and {len(others):,} more such files" if others else "")
