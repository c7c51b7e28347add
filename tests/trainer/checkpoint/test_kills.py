"""SIGKILL at random moments: whatever it hits, the next start goes on, and the end is the same to the bit."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from helpers.faults import outcome, run_in_child, small_run
from trainer.checkpoint.files import checkpoints_in, damage, newest_checkpoint

SAVE_INTERVAL = 2


def kill_at_random(kills: int, folder: Path) -> str:
    """Kill runs until it was done so many times; every one is brought to its end and compared."""
    chance = random.Random(kills)

    def new_run(name: str):
        return small_run(folder, epochs=2, save_interval=SAVE_INTERVAL, save_dir=str(folder / name), from_resume=1)

    started = time.monotonic()
    assert run_in_child(new_run("unbroken")) == 0
    expected, duration = outcome(new_run("unbroken")), time.monotonic() - started
    killed = runs = with_litter = 0
    while killed < kills:
        runs += 1
        config, newest, finished = new_run(f"run_{runs}"), 0, False
        while not finished:
            kill_after = chance.uniform(0, duration) if killed < kills else None
            status = run_in_child(config, kill_after)
            assert status in (0, -signal.SIGKILL), (folder / "child.log").read_text()[-2000:]
            finished, killed = status == 0, killed + (status != 0)
            duration *= 0.9 if finished else 1.0  # a start that outran its kill: the machine has become faster
            checkpoints = config.run_dir / "checkpoints"
            assert not [path for path in checkpoints_in(checkpoints) if damage(path)]
            path = newest_checkpoint(checkpoints)
            step = int(path.name[5:]) if path else 0
            assert step >= newest  # nothing is lost that was saved
            assert last_logged_step(config) - step <= 2 * SAVE_INTERVAL  # the last save, and one in the background
            with_litter += any(checkpoints.glob(".tmp-*"))
            newest = step
        assert outcome(config) == expected
        assert not list((config.run_dir / "checkpoints").glob(".tmp-*"))
    return f"{killed} kills of {runs} runs, {with_litter} of them in the middle of a save, all ends the same to the bit"


def last_logged_step(config) -> int:
    path = config.run_dir / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_20_random_kills(tmp_path):
    kill_at_random(20, tmp_path)


@pytest.mark.soak
def test_200_random_kills(tmp_path):
    started = time.monotonic()
    print("\n" + kill_at_random(200, tmp_path) + f", {time.monotonic() - started:.0f} s")
