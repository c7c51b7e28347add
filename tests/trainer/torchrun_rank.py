"""What torchrun starts in test_torchrun.py: a stage, and the faults that belong to this rank, step and attempt.

FAULTS in the environment is JSON: [[rank, step, attempt, signal, "self" or "agent"], ...]; without it nothing happens.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.stage import run_stage

faults = json.loads(os.environ.get("FAULTS", "[]"))
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
original = Runtime.leave_step
started = Path(sys.argv[1]).with_suffix(".steps")


def leave_step(self: Runtime, step: int) -> None:
    original(self, step)
    if self.is_main:
        with started.open("a") as file:
            file.write(f"{attempt} {step} {time.time()}\n")
    for rank, when, which_attempt, number, target in faults:
        if (rank, when, which_attempt) == (self.rank, step, attempt):
            os.kill(os.getpid() if target == "self" else os.getppid(), signal.Signals(number))


Runtime.leave_step = leave_step
values = json.loads(Path(sys.argv[1]).read_text())
run_stage(StageConfig(**{**values, "trainable": tuple(values["trainable"])}))
