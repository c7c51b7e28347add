"""Stopping on request: a signal is noted, the ranks agree after a step, all save that step and leave."""

import os
import signal
import threading
from types import FrameType

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows has the first two
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(Exception):
    """Every rank has saved the same step because a signal asked at least one of them to stop."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class StopRequest:
    """Within `with`, the first of STOPPING is noted and further ones change nothing; before training it ends the run.

    Under torchrun the death of the launcher counts as SIGHUP: without it nobody would notice a lost rank.
    """

    def __init__(self) -> None:
        self.training = False
        self._number = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def number(self) -> int:
        """The signal that asked this rank to stop, 0 where none did."""
        if not self._number and self._launcher is not None and os.getppid() != self._launcher:
            self._number = int(getattr(signal, "SIGHUP", signal.SIGTERM))
        return self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number = number
            if not self.training:
                raise Stopped(number)
            # Not print: the signal may have come while something was being printed.
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then leaving\n".encode())


def ignore_stopping(_: int = 0) -> None:
    """For processes that read data: the rank that they work for decides when it is time to leave."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
