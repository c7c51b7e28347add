"""How fast a run goes: what it learns a second, where its seconds stay, what share of the device's arithmetic it uses.

Nothing here makes the host wait for a GPU but `read`, which a log line calls.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch

from dataset.step_batch import Counts
from model.device import peak_flops
from model.flops import StepFlops
from model.model_minimind import MiniMindForCausalLM
from trainer.distributed import Runtime

try:
    import resource
except ImportError:  # Windows
    resource = None

PHASES = ("forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of each phase; on a GPU between events in its own stream, as the host is ahead of it."""

    def __init__(self, device: torch.device):
        self._events = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def enter(self, phase: str) -> None:
        """What follows belongs to a phase, or to none: ""."""
        if self._events:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._events and self._marks:
            self._marks[-1][1].synchronize()
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += begun.elapsed_time(ended) / 1000 if self._events else ended - begun
        self._marks.clear()
        return seconds


class Meter:
    """Counts between two log lines. Every rank has one, and all read it together."""

    def __init__(self, runtime: Runtime, flops: Callable[[Counts], float]):
        """flops: the useful arithmetic of what was counted, in floating-point operations."""
        self.runtime, self.flops = runtime, flops
        self.peak = runtime.sum(peak_flops(runtime.device, runtime.dtype))[0]  # of all ranks; 0: not known
        self._watch = Stopwatch(runtime.device)
        self.enter = self._watch.enter
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps, self._counts, self._waited = time.perf_counter(), 0, Counts(), 0.0

    def count(self, counts: Counts) -> None:
        """Once a step: what this rank learnt from."""
        self._steps += 1
        self._counts = self._counts.plus(counts)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what a step waits for before it can begin: its data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def pause(self, seconds: float) -> None:
        """Take time that was not training (a validation, a save) out of the speed."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """The speed of all ranks since the last reading, and where this rank's time and memory went."""
        phases = self._watch.read()
        seconds = time.perf_counter() - self._since
        counts = Counts(*self.runtime.sum(*self._counts))
        speed = {
            "rows_per_second": counts.rows / seconds,
            "conversations_per_second": counts.conversations / seconds,
            "supervised_tokens_per_second": counts.supervised / seconds,
            "data_wait": self._waited / seconds,
            **{f"{phase}_seconds": total / max(1, self._steps) for phase, total in phases.items()},
        }
        if memory := peak_memory(self.runtime.device):
            speed["memory_gb"] = memory / 1e9
        if self.peak:
            speed["mfu"] = self.flops(counts) / seconds / self.peak
        self._begin()
        return speed

    def __str__(self) -> str:
        if not self.peak:
            return "this device multiplies no matrices that could be timed: mfu is not told"
        return f"mfu is the share of {self.peak / 1e9:,.0f} GFLOP/s, at which large matrices were multiplied here"


def useful_flops(model: MiniMindForCausalLM, encodes: bool) -> Callable[[Counts], float]:
    """What StepFlops says of counted rows. encodes: pictures go through the tower, their features are not cached."""
    flops = StepFlops(model)
    return lambda counts: flops.count(
        counts.tokens, counts.squared_lengths, counts.supervised, counts.pictures, counts.pictures if encodes else 0
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or this process on a CPU; 0 where it is not known (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
