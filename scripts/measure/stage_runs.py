"""The real stage scripts as processes, as a user starts them, and what their metrics say."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from model.messages import UserError
from scripts.quickstart import CONCEPTS, QUESTIONS, ROOT, TOWER

WARM_UP = 2  # log lines that do not count
PATIENCE = 15  # seconds for a launcher to end its ranks
# Nothing but steps is measured: no validation, no checkpoint.
COMMON = ("--vision_model", TOWER, "--val_samples", 0, "--save_interval", 1_000_000)


def arguments_of(flags: dict) -> list:
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def build_data(folder: Path, sft: int, pretrain: int = 0) -> None:
    """So many pictures of Emoji World for stage 2 and stage 1, as the quickstart draws them."""
    flags = {"concepts": CONCEPTS, "questions": QUESTIONS, "pretrain": pretrain, "sft": sft, "held_out": 0,
             "output": folder}  # fmt: skip
    run_process([sys.executable, ROOT / "scripts/build_emoji_world.py", *arguments_of(flags)])


def stage_metrics(stage: str, arguments: Sequence, folder: Path, ranks: int = 0, threads: int = 1) -> list[dict]:
    """The log lines of a run, without the first ones. ranks: processes under torchrun; 0: one, without torchrun.

    threads: of each process.

    Raises:
        UserError: the run failed, or no other lines are left.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks else []
    command = [sys.executable, *launcher, ROOT / f"trainer/{stage}.py", *COMMON, *arguments, "--save_dir", folder]
    run_process(command, threads)
    (path,) = folder.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "rows_per_second" in line][WARM_UP:]
    if not lines:
        raise UserError("the run was too short to be measured")
    return lines


def child_environment(threads: int) -> dict[str, str]:
    """For a script of this project: it finds our packages, and all that this process finds by PYTHONPATH."""
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": found}


def run_process(command: Sequence, threads: int = 1) -> None:
    """Wait for a process. An exception while waiting, such as a time limit, ends the process and its ranks.

    Raises:
        UserError: it failed; with the end of its output.
    """
    process = subprocess.Popen(
        [str(part) for part in command], env=child_environment(threads), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()  # torchrun ends its ranks, which are in sessions of their own
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    if process.returncode:
        name = next(Path(part).name for part in command if str(part).endswith(".py"))
        raise UserError(f"{name} ended with code {process.returncode}:\n{output[-2000:].strip()}")
