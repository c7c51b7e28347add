"""Batches that outlive a process that reads them: the first one to be lost is replaced, the second ends the run."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator

from torch.utils.data import Dataset

from dataset.step_batch import StepBatch
from model.messages import UserError

POLL = 5  # seconds; a DataLoader's timeout, after which it also looks whether its processes live
PATIENCE = 120  # seconds that one step's batch may take
# How torch's messages begin where a process died or does not answer, and those of a process's own errors.
LOST, LATE, OWN = "DataLoader ", "DataLoader timed out", "Caught "
NO_FILES = "Too many open files"
Batches = Iterator[StepBatch | UserError]


class WorkersLost(RuntimeError):
    """Processes that read data died or hung twice, or could open no more files."""


class ErrorsAsItems(Dataset):
    """A data set that gives what a user can mend as an item: a DataLoader would make another error of it, with a
    traceback for a message."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, index: object) -> StepBatch | UserError:
        try:
            return self.data[index]
        except UserError as error:
            return error


def resilient_batches(open_at: Callable[[int], Batches], first_step: int) -> Iterator[StepBatch]:
    """What open_at(first_step) yields, a step each, read on from the same step by new processes if one of them is lost.

    The order is a pure function of the step, so nothing is lost or repeated.

    Raises:
        WorkersLost: it happened again, or no more files can be opened.
        UserError: what a process gave instead of a batch.
        Exception: a process's own, with its traceback.
    """
    batches, step, lost = _open(open_at, first_step), first_step, 0
    while True:
        try:
            batch = _next_within_patience(batches)
        except StopIteration:
            return
        except Exception as error:
            if not _is_loss(error, step):
                raise
            lost += 1
            for process in multiprocessing.active_children():  # one that hangs ignores everything else, see signals.py
                process.kill()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if lost > 1:
                raise WorkersLost(
                    f"processes that read data were lost twice, the last time at step {step} "
                    f"({reason}): probably out of memory, or a file that never answers; lower "
                    "--num_workers"
                ) from error
            print(f"a process that reads data was lost ({reason}): starting new ones", flush=True)
            del batches
            batches = _open(open_at, step)
            continue
        if isinstance(batch, UserError):
            raise batch
        step += 1
        yield batch


def _is_loss(error: Exception, step: int) -> bool:
    """Whether a process died or hangs. Raises WorkersLost where new ones would meet the same."""
    if NO_FILES in str(error):
        reason = next(line for line in str(error).splitlines()[::-1] if NO_FILES in line)
        raise WorkersLost(
            f"the processes that read data could open no more files at step {step} ({reason}): allow more "
            "(ulimit -n 65536), or lower --num_workers"
        ) from error
    # It died with a batch on its way: torch asks the process itself for the memory that the batch lies in.
    unreachable = isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith(OWN)
    return str(error).startswith(LOST) or unreachable


def _next_within_patience(batches: Batches) -> StepBatch | UserError:
    for _ in range(PATIENCE // POLL - 1):
        try:
            return next(batches)
        except RuntimeError as error:
            if not str(error).startswith(LATE):
                raise
    return next(batches)


def _open(open_at: Callable[[int], Batches], step: int) -> Batches:
    batches = open_at(step)
    # torch raises a worker's death wherever the main thread happens to be, in the middle of an optimizer step too.
    # Without its handler the loss shows where a batch is waited for.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches
