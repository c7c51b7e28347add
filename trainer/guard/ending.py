"""How a run ends: what its user can mend becomes one sentence, a signal its own exit status."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from traceback import clear_frames

from model.messages import UserError
from trainer.distributed import RanksLost, stop_runtime
from trainer.guard.signals import Stopped, StopRequest
from trainer.guard.workers import WorkersLost

PATIENCE = 10.0  # seconds


@contextlib.contextmanager
def plain_ending(stage: str, stop: StopRequest) -> Iterator[None]:
    """Around a whole run. What its user can mend ends in SystemExit with one sentence, a signal in its own status.

    All other errors keep their traceback: they are slips of ours.
    """
    try:
        yield
    except (UserError, RanksLost, WorkersLost) as error:
        _release(error)
        sentence = f"{stage}: {error}"
        if isinstance(error, UserError):
            wait_to_be_ended()
            note_for_torchrun(sentence)
        raise SystemExit(sentence) from error
    except Stopped as stopped:
        _release(stopped)
        then = "--from_resume 1 goes on from the last checkpoint"  # which all ranks have just written
        if not stop.training:
            then = "before its first step, with nothing to save: the same command begins again"
        print(f"{stage}: {stopped}; {then}", flush=True)
        raise SystemExit(128 + stopped.number) from stopped
    finally:
        stop_runtime()


def _release(error: Exception) -> None:
    """Leave the group of ranks; the error's frames hold a model that must be gone before, see stop_runtime."""
    clear_frames(error.__traceback__)
    stop_runtime()


def wait_to_be_ended() -> None:
    """Ranks but the first of a machine wait before they say what is wrong: torchrun ends them once the first has.

    Where the first did not meet the same, this rank's own words come a little later.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)


def note_for_torchrun(sentence: str) -> None:
    """Leave the sentence where torchrun looks for the reason, so that its report ends with it and not with a link."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
