"""torchrun with two ranks: it comes back by itself to the same bits, and hands a stop on to all of them."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.faults import outcome, run_ranks, small_run
from helpers.repository import ROOT
from helpers.runs import status_of
from model.process_lock import is_held

RANK = Path(__file__).with_name("torchrun_rank.py")
STEPS = 24


def launch(config, faults: list, restarts: int) -> subprocess.CompletedProcess:
    """torchrun, from a folder that is not the project's; waits until its ranks have left the run's folder too."""
    path = Path(config.save_dir).parent / "config.json"
    path.write_text(json.dumps(vars(config)))
    path.with_suffix(".steps").unlink(missing_ok=True)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULTS": json.dumps(faults)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max_restarts", str(restarts), str(RANK), str(path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=path.parent, env={**os.environ, **settings}, capture_output=True, text=True, timeout=1500
    )
    deadline = time.monotonic() + 60  # a killed launcher leaves ranks that still save
    while is_held(config.run_dir / "lock"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return done


def seconds_to_come_back(config) -> list[float]:
    """From the last step of an attempt to the first step of the next."""
    lines = [line.split() for line in (Path(config.save_dir).parent / "config.steps").read_text().splitlines()]
    moments = [(int(attempt), float(moment)) for attempt, _, moment in lines]
    return [b[1] - a[1] for a, b in zip(moments, moments[1:], strict=False) if a[0] != b[0]]


def unbroken_outcome(folder: Path) -> dict:
    config = small_run(folder, batch_size=1, epochs=2, log_interval=3, save_dir=str(folder / "unbroken"))
    assert run_ranks(config, 2) == [0, 0]
    return outcome(config)


def test_torchrun_restarts_by_itself_and_hands_a_stop_on(tmp_path):
    expected = unbroken_outcome(tmp_path)
    config = small_run(tmp_path, batch_size=1, epochs=2, log_interval=3, num_workers=1)
    ranks = [[1, 4], [0, 8], [1, 11], [0, 14]]  # and the step after which each is killed
    kills = [[rank, step, attempt, signal.SIGKILL, "self"] for attempt, (rank, step) in enumerate(ranks)]
    done = launch(config, [*kills, [0, 17, len(kills), signal.SIGTERM, "agent"]], restarts=5)
    assert done.returncode != 0 and "rank 0 at step" in done.stderr + done.stdout, done.stderr[-3000:]
    status = status_of(config)
    assert (status["state"], status["reason"]) == ("stopped-resumable", "stopped by SIGTERM"), done.stderr[-3000:]
    assert 17 <= status["step"] <= 19 and status["last_checkpoint"].endswith(f"step-{status['step']:08d}")
    assert run_ranks(dataclasses.replace(config, from_resume=1), 2) == [0, 0]
    assert outcome(config) == expected
    assert len(seconds_to_come_back(config)) == len(kills) and max(seconds_to_come_back(config)) < 60


@pytest.mark.soak
def test_50_torchrun_kills(tmp_path):
    """Rank 0, rank 1 or the launcher, at any step; every run ends with the bits of one that nobody disturbed."""
    expected, chance = unbroken_outcome(tmp_path), random.Random(0)
    kills = runs = 0
    waits: list[float] = []
    while kills < 50:
        runs += 1
        config = small_run(tmp_path, batch_size=1, epochs=2, log_interval=3, save_dir=str(tmp_path / f"run_{runs}"))
        config = dataclasses.replace(config, num_workers=runs % 2)
        step = 0
        while step < STEPS and kills < 50:
            faults, by_agent = [], False
            while not by_agent and step < STEPS - 2 and len(faults) < 3:
                step += chance.randint(2, 6)
                rank, by_agent = chance.randrange(2), chance.random() < 0.25
                faults.append([rank, step, len(faults), signal.SIGKILL, "agent" if by_agent else "self"])
            faults = [fault for fault in faults if fault[1] <= STEPS]
            launch(dataclasses.replace(config, from_resume=1), faults, restarts=3)
            kills += len(faults)
            waits += seconds_to_come_back(config)
            if status_of(config)["state"] == "done":
                break
        assert run_ranks(dataclasses.replace(config, from_resume=1), 2) == [0, 0]
        assert outcome(config) == expected
    print(
        f"\n{kills} torchrun kills in {runs} runs, all bit-identical; training again after {max(waits):.1f} s at most"
    )
    assert max(waits) < 60
