"""One writer a folder, a folder that can be written, status.json, and what scripts/status.py makes of it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.faults import in_child, run_in_child, small_run
from helpers.repository import ROOT
from helpers.runs import ORIGINAL_TRAIN_STEP, run_until, status_of
from scripts import status as status_script
from trainer import data, loop, stage
from trainer.checkpoint import files as checkpoint
from trainer.checkpoint import saver
from trainer.checkpoint.files import DiskFull
from trainer.guard.run_folder import FAILURES, LOCK


def hold_in_child(config, tmp_path) -> int:
    """A child that starts a run and stays in its first step for ever; returns its number once it is there."""

    def stay(*_):
        (tmp_path / "there").write_text("")
        time.sleep(600)

    child = os.fork()
    if child == 0:
        loop.train_step = stay
        try:
            stage.run_stage(config)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return child


def test_second_run_of_a_folder_is_refused_at_once_and_the_lock_ends_with_the_process(tmp_path, capfd):
    config = small_run(tmp_path, num_workers=1)
    child = hold_in_child(config, tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(SystemExit, match=f"is in use by process {child} on {os.uname().nodename}.*--save_dir"):
            stage.run_stage(config)
        assert time.monotonic() - started < 2
        assert status_of(config)["pid"] == child and status_script.is_held(config.run_dir / "lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert "running" not in status_script.describe(config.run_dir, 40)
    assert "killed" in status_script.describe(config.run_dir, 40)
    stage.run_stage(config)  # although the reading process of the killed run may still be there
    assert status_of(config)["state"] == "done"


@pytest.mark.parametrize("obstacle", ["a file in its place", "read-only"])
def test_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(obstacle, tmp_path, monkeypatch):
    config = small_run(tmp_path, save_dir=str(tmp_path / "out/deep"))
    monkeypatch.setattr(stage, "build_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "out").mkdir()
    if obstacle == "read-only":
        (tmp_path / "out").chmod(0o555)
    else:
        (tmp_path / "out/deep").write_text("")

    def run():
        if obstacle == "read-only" and os.getuid() == 0:
            os.setuid(65534)  # root may write anywhere
        stage.run_stage(config)

    started = time.monotonic()
    assert in_child(run, tmp_path / "log") == 1
    assert time.monotonic() - started < 5
    said = (tmp_path / "log").read_text()
    assert f"run folder {config.run_dir} cannot be written (" in said and "--save_dir" in said
    assert "Traceback" not in said


# ---- status.json


def test_status_of_a_finished_run(tmp_path, capsys):
    config = small_run(tmp_path)
    stage.run_stage(config)
    status = status_of(config)
    assert (status["state"], status["step"], status["total_steps"], status["epoch"]) == ("done", 12, 12, 1.0)
    assert (status["samples_seen"], status["samples_skipped"], status["reason"]) == (24, 0, None)
    assert status["last_checkpoint"] == str(config.run_dir / "checkpoints/step-00000012")
    capsys.readouterr()
    status_script.main([str(config.save_dir), "--width", "20"])
    said = capsys.readouterr().out
    assert f"{config.run_dir}: done\n  step 12/12, epoch 1.00, 24 rows seen, 0 skipped in 0 steps" in said
    assert "step 1 to 12: 8." in said and "█" in said


def test_status_of_runs_that_failed(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    run_until(config, 3, monkeypatch)
    assert status_of(config)["state"] == "crashed" and "KeyboardInterrupt" in status_of(config)["reason"]
    with pytest.raises(SystemExit):
        stage.run_stage(dataclasses.replace(config, data_path=str(tmp_path / "absent.jsonl")))
    status = status_of(config)
    assert status["state"] == "fatal-input" and "absent.jsonl does not exist" in status["reason"]
    assert "reason: " in status_script.describe(config.run_dir, 40)


def test_status_is_whole_whenever_it_is_read(tmp_path, monkeypatch):
    config = small_run(tmp_path, epochs=3)
    monkeypatch.setattr("trainer.guard.run_folder.EVERY", 0.0)
    read, stop = [], threading.Event()

    def read_all_the_time():
        while not stop.is_set():
            if (config.run_dir / "status.json").exists():
                read.append(status_of(config)["step"])

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    try:
        stage.run_stage(config)
    finally:
        stop.set()
        reader.join()
    assert len(read) > 20 and read == sorted(read) and len(set(read)) > 5


def test_curve_shows_means_and_extremes():
    lines = status_script.curve(list(range(1, 101)), [8.0] * 50 + [1.0] * 50, width=10)
    assert lines[0] == "   8.000 █████" and lines[-2] == "   1.000 ██████████"
    assert "step 1 to 100: 8.000 to 1.000, lowest 1.000" in lines[-1]
    assert status_script.curve([1], [0.0], width=10)[-1].endswith("lowest 0.000")


def test_curve_leaves_out_what_is_no_number(tmp_path):
    lines = ['{"step": 1, "loss": 3.5}', '{"step": 2, "loss": null}', '{"step": 2, "val_loss": null}',
             '{"step": 3, "loss": NaN}', '{"step": 4, "loss": 2.5}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert status_script.losses_of(tmp_path / "metrics.jsonl") == ([1, 4], [3.5, 2.5])


def test_status_script_starts_without_torch():
    """Seconds, for a look at a few files."""
    code = "import sys, scripts.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_status_script_tells_what_it_looked_for(tmp_path):
    with pytest.raises(SystemExit, match="no status.json in"):
        status_script.main([str(tmp_path)])


# ---- a disk without room, while a run goes on


def full_disk(monkeypatch, saves: set[int]) -> None:
    """These saves, counted from 1, find no room."""
    original, count = checkpoint.write_checkpoint, [0]

    def write(*arguments):
        count[0] += 1
        if count[0] in saves:
            raise DiskFull("a checkpoint needs 812.0 MB, 40.0 MB can be written in /x")
        return original(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", write)


def test_training_goes_on_past_two_saves_without_room(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    full_disk(monkeypatch, {2, 3})
    stage.run_stage(config)
    said = capsys.readouterr().out
    assert (
        said.count("saving failed (a checkpoint needs 812.0 MB, 40.0 MB can be written in /x); training goes on") == 2
    )
    assert status_of(config)["state"] == "done"


def test_third_save_without_room_ends_the_run(tmp_path, monkeypatch):
    config = small_run(tmp_path, epochs=2)
    full_disk(monkeypatch, {3, 4, 5, 6, 7, 8})
    with pytest.raises(SystemExit, match="the last [34] saves failed: a checkpoint needs 812.0 MB.*--from_resume 1"):
        stage.run_stage(config)
    assert status_of(config)["state"] == "fatal-disk"
    assert checkpoint.newest_checkpoint(config.run_dir / "checkpoints").name == "step-00000004"


def test_last_save_without_room_is_no_success(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    full_disk(monkeypatch, {6})
    with pytest.raises(SystemExit, match="the last 1 saves failed: a checkpoint needs 812.0 MB"):
        stage.run_stage(config)
    assert status_of(config)["state"] == "fatal-disk"
    full_disk(monkeypatch, set())
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    assert status_of(config)["state"] == "done"


# ---- restarts by torchrun


@pytest.fixture
def restarted(monkeypatch):
    """Pretend to be the n-th attempt of one launch."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one-launch")
    return lambda n: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(n))


def test_what_cannot_help_is_not_tried_again(tmp_path, restarted, monkeypatch):
    config = small_run(tmp_path, data_path=str(tmp_path / "absent.jsonl"))
    restarted(0)
    with pytest.raises(SystemExit, match="does not exist"):
        stage.run_stage(config)
    restarted(1)
    monkeypatch.setattr(data, "load_data", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(SystemExit, match="not tried again after rank 0 ended with: .*absent.jsonl does not exist"):
        stage.run_stage(config)
    assert status_of(config)["state"] == "fatal-input"


def test_an_error_that_comes_back_is_tried_twice(tmp_path, restarted, monkeypatch):
    config = small_run(tmp_path)
    taken = []

    def break_at_the_same_place(*arguments):
        taken.append(1)
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(loop, "train_step", break_at_the_same_place)
    for attempt in (0, 1):
        restarted(attempt)
        with pytest.raises(ZeroDivisionError):
            stage.run_stage(config)
    restarted(2)
    with pytest.raises(SystemExit, match="not tried again after rank 0 ended with: ZeroDivisionError"):
        stage.run_stage(config)
    assert len(taken) == 2
    monkeypatch.setattr(loop, "train_step", ORIGINAL_TRAIN_STEP)
    restarted(0)  # somebody mended it and starts again
    stage.run_stage(config)
    assert status_of(config)["state"] == "done" and len((config.run_dir / FAILURES).read_text().splitlines()) >= 2


def test_failures_of_earlier_launches_do_not_count(tmp_path, monkeypatch):
    """In a container every launch is `none:1`: no name of its own, and torchrun is the first process."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    config = small_run(tmp_path)

    def attempt(number: int, said: str | None) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

        def work(*arguments):
            if said:
                raise ZeroDivisionError(said)
            return ORIGINAL_TRAIN_STEP(*arguments)

        monkeypatch.setattr(loop, "train_step", work)
        with pytest.raises(ZeroDivisionError, match=said) if said else contextlib.nullcontext():
            stage.run_stage(config)

    attempt(0, "a card that fell off the bus")
    with pytest.raises(SystemExit, match="does not exist"):  # and a restart would not help
        stage.run_stage(dataclasses.replace(config, data_path=str(tmp_path / "absent.jsonl")))
    attempt(0, "a card that fell off the bus")
    attempt(1, "a card that fell off the bus")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(SystemExit, match="not tried again after rank 0 ended with: ZeroDivisionError: a card"):
        stage.run_stage(config)
    attempt(0, "a card that fell off the bus")
    attempt(1, None)
    assert status_of(config)["state"] == "done"
    lines = (config.run_dir / FAILURES).read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines].count("crashed") == 4  # and all are kept


def test_a_slip_of_ours_is_not_taken_for_the_users(tmp_path, restarted, monkeypatch):
    """Python and torch raise ValueError too: it keeps its traceback, and a restart tries again."""
    config = small_run(tmp_path)

    def unpack_too_few(*_):
        _one, _other = [1]

    monkeypatch.setattr(loop, "train_step", unpack_too_few)
    restarted(0)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        stage.run_stage(config)
    assert status_of(config)["state"] == "crashed" and status_of(config)["reason"].startswith("ValueError: not enough")
    monkeypatch.setattr(loop, "train_step", ORIGINAL_TRAIN_STEP)
    restarted(1)
    stage.run_stage(config)
    assert status_of(config)["state"] == "done"


def test_lock_is_not_inherited_by_reading_processes(tmp_path):
    """The reason for a lock of the process (lockf) instead of one of the open file (flock)."""
    path = tmp_path / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def try_in_child():
        with Path(path).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert in_child(try_in_child, tmp_path / "log") == 70  # held by us
    os.close(descriptor)
    assert in_child(try_in_child, tmp_path / "log") == 0
    assert run_in_child(small_run(tmp_path)) == 0
