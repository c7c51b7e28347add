"""The progress of a long task: a bar in a terminal, a plain line now and then in a file or a pipe."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds from one plain line to the next

Item = TypeVar("Item")


class Progress:
    """`with Progress(total, "encoding", "picture") as progress`, and progress.update() whenever one more is done.

    is_bar: whether there is a terminal. On it, tqdm's bar; elsewhere a line on stderr every EVERY seconds, as a bar
    would be thousands of carriage returns there.
    """

    def __init__(self, total: int, what: str, unit: str, done: int = 0, silent: bool = False):
        """done: what an earlier start has done. silent: print nothing, as other ranks do. Bytes ("B") are scaled."""
        self.n, self._silent, self._scaled, self._first = done, silent, unit == "B", done
        disable = True if silent else None  # None: where there is no terminal
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=self._scaled, disable=disable)
        self.is_bar = not self._bar.disable
        self._total, self._what, self._unit = total, what, unit
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, more: int = 1) -> None:
        self.n += more
        if self.is_bar:
            self._bar.update(more)
        elif not self._silent and time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            line = tqdm.format_meter(
                self.n, self._total, self._printed - self._started, ncols=0, prefix=self._what, unit=self._unit,
                unit_scale=self._scaled, initial=self._first,
            )  # fmt: skip
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Text behind the bar, where there is one."""
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


def progress_over(items: Sequence[Item], what: str, unit: str, silent: bool = False) -> Iterator[Item]:
    """The items one by one, as tqdm gives them."""
    with Progress(len(items), what, unit, silent=silent) as progress:
        for item in items:
            yield item
            progress.update()


def say(line: str) -> None:
    """A line of its own, above whatever bar is shown."""
    tqdm.write(line)
