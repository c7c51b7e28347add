"""Batches that outlive a process that reads them: the first one to be lost is replaced, the second ends the run."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator

import torch

Batch = dict[str, torch.Tensor]
POLL = 5  # seconds; a DataLoader's timeout, after which it also looks whether its processes live
PATIENCE = 120  # seconds that one batch may take


class WorkersLost(RuntimeError):
    """Processes that read data died or hung twice."""


def steady_batches(open_at: Callable[[int], Iterator[Batch]], first_step: int, a_step: int) -> Iterator[Batch]:
    """What open_at(first_step) yields, read on from the same place by new processes if one of them is lost.

    The order is a pure function of the step, so nothing is lost or repeated. a_step: micro-batches a step.

    Raises:
        WorkersLost: it happened again.
    """
    batches, taken, lost = _open(open_at, first_step), 0, 0
    while True:
        try:
            batch = _next_within_patience(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            lost += 1
            for process in multiprocessing.active_children():  # one that hangs ignores everything else, see signals.py
                process.kill()
            if lost > 1:
                raise WorkersLost(
                    f"processes that read data were lost twice, the last time at step {first_step + taken // a_step} "
                    f"({str(error).splitlines()[0]}): probably out of memory, or a file that never answers; lower "
                    "--num_workers"
                ) from error
            print(f"a process that reads data was lost ({str(error).splitlines()[0]}): starting new ones", flush=True)
            del batches
            batches = _open(open_at, first_step + taken // a_step)
            for _ in range(taken % a_step):
                _next_within_patience(batches)
            continue
        taken += 1
        yield batch


def _next_within_patience(batches: Iterator[Batch]) -> Batch:
    for _ in range(PATIENCE // POLL - 1):
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
    return next(batches)


def _open(open_at: Callable[[int], Iterator[Batch]], step: int) -> Iterator[Batch]:
    batches = open_at(step)
    # torch raises a worker's death wherever the main thread happens to be, in the middle of an optimizer step too.
    # Without its handler the loss shows where a batch is waited for.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches
