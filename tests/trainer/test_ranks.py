"""Two ranks: killed, stopped, hung, asked to leave, given bad numbers, made more and fewer."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest

from dataset.samples import BadSample
from dataset.vlm_dataset import ConversationDataset
from helpers.faults import outcome, run_ranks, said_by, small_run, start_ranks, wait_for
from helpers.runs import records
from trainer import data, distributed, loop, stage
from trainer.checkpoint import resume, saver
from trainer.checkpoint.files import checkpoints_in
from trainer.guard import finite, workers
from trainer.guard.signals import STOPPING

EPOCHS = 2  # 12 steps of 2 samples


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    """What two ranks make of the data when nothing happens to them."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = small_run(folder, batch_size=1, epochs=EPOCHS, log_interval=3)
    assert run_ranks(config, 2) == [0, 0]
    return outcome(config)


@pytest.fixture
def config(tmp_path):
    return small_run(tmp_path, batch_size=1, epochs=EPOCHS, log_interval=3)


def resumed(config):
    return dataclasses.replace(config, from_resume=1)


def test_killed_ranks_come_back_to_the_same_bits(config, unbroken):
    for rank, step in ((1, 3), (0, 5), (1, 12), (0, 13), (1, 23)):

        def kill(own, now, rank=rank, step=step):
            if (own, now) == (rank, step):
                os.kill(os.getpid(), signal.SIGKILL)

        started = time.monotonic()
        statuses = run_ranks(resumed(config), 2, kill)
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
        assert time.monotonic() - started < 60
        said = said_by(config, 1 - rank)
        assert "lost another rank" in said and "--from_resume 1" in said
    assert run_ranks(resumed(config), 2) == [0, 0]
    assert outcome(config) == unbroken
    assert "Traceback" not in said_by(config, 0) + said_by(config, 1)


@pytest.mark.parametrize("to", ["rank 0", "rank 1", "every process"])
def test_every_signal_saves_the_very_step_on_all_ranks(to, config, unbroken, monkeypatch):
    """Signals one after the other, five steps apart, each with a second one that comes while the save is written."""
    config = dataclasses.replace(config, num_workers=1, save_interval=100)
    original = saver.write_checkpoint

    def interrupted_write(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", interrupted_write)
    for number, which in enumerate(STOPPING, 1):
        step = 5 * number

        def send(own, now, step=step, which=which):
            if now == step and to in ("every process", f"rank {own}"):
                os.killpg(0, which) if to == "every process" else os.kill(os.getpid(), which)

        started = time.monotonic()
        assert run_ranks(resumed(config), 2, send) == [128 + which, 128 + which]
        assert time.monotonic() - started < 30
        assert checkpoints_in(config.run_dir / "checkpoints")[-1].name == f"step-{step:08d}"
        status = json.loads((config.run_dir / "status.json").read_text())
        assert status["state"] == "stopped-resumable" and status["reason"] == f"stopped by {signal.Signals(which).name}"
        assert status["step"] == step and status["last_checkpoint"].endswith(f"step-{step:08d}")
    monkeypatch.undo()
    assert run_ranks(resumed(config), 2) == [0, 0]
    assert outcome(config) == unbroken


def test_signal_before_the_first_step_ends_the_run_at_once(config):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.stage.build_model", interrupt)
        assert run_ranks(config, 1) == [128 + signal.SIGTERM]
    assert "stopped by SIGTERM" in said_by(config, 0)


def test_stopped_run_says_what_it_left_out(config):
    with Path(config.data_path).open("a") as file:
        file.write("no JSON\n")

    def stop(own, now):
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run_ranks(dataclasses.replace(config, max_bad_share=0.5), 1, stop) == [128 + signal.SIGTERM]
    assert "\nleft out: 1 bad sample," in said_by(config, 0)


def test_hung_rank_is_noticed_within_the_timeout_and_named(config, monkeypatch):
    limit = 2.0
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.datetime.timedelta(seconds=limit))
    hung = config.run_dir.parent / "hung"

    def hang(own, now):
        if (own, now) == (1, 5):
            hung.write_text("")
            os.kill(os.getpid(), signal.SIGSTOP)

    children = start_ranks(config, 2, hang)
    try:
        while not hung.exists():
            time.sleep(0.05)
        started = time.monotonic()
        assert wait_for(children[:1], limit + 15) == [1]
        assert time.monotonic() - started < limit + 5
    finally:
        os.kill(children[1], signal.SIGKILL)
        wait_for(children[1:])
    assert re.search(r"rank 0 at step 5 lost another rank \(rank 1, last seen at step 5\)", said_by(config, 0))
    status = json.loads((config.run_dir / "status.json").read_text())
    assert status["state"] == "crashed" and "rank 1" in status["reason"]


def test_no_number_on_one_rank_is_skipped_on_both(config, monkeypatch):
    count, train_step = [0], loop.train_step

    def spoiled_on_rank_1(run, *rest):
        count[0] += 1
        bad = os.environ["RANK"] == "1" and count[0] == 4

        def spoil(_, __, output):
            output.loss = output.loss * math.nan

        hook = run.parallel_model.module.register_forward_hook(spoil) if bad else None
        values = train_step(run, *rest)
        if hook is not None:
            hook.remove()
        return values

    monkeypatch.setattr(loop, "train_step", spoiled_on_rank_1)
    config = dataclasses.replace(config, log_interval=1)
    assert run_ranks(config, 2) == [0, 0]
    assert [record["step"] for record in records(config)] == [1, 2, 3, *range(5, 25)]
    (named,) = [json.loads(line) for line in (config.run_dir / finite.SKIPPED).read_text().splitlines()]
    assert named["step"] == 4 and named["ranks"] == [1] and named["losses"][1] == "nan" and len(named["samples"]) == 1


@pytest.fixture
def machines(monkeypatch, tmp_path):
    """Give rank 1 other flags than rank 0, as on a machine of its own."""

    def give(**changes):
        original = stage.run_stage
        monkeypatch.setattr(
            stage, "run_stage",
            lambda config: original(dataclasses.replace(config, **(changes if os.environ["RANK"] == "1" else {}))),
        )  # fmt: skip

    return give


def test_machines_that_differ_are_refused_with_what_differs(config, machines, tmp_path):
    lines = Path(config.data_path).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:-2]))
    machines(data_path=str(tmp_path / "other.jsonl"), save_interval=3)
    assert run_ranks(config, 2) == [1, 1]
    for rank in range(2):
        said = said_by(config, rank)
        for part in ("rank 1 on", "is not like rank 0 on", "data: expected", "samples: expected 24, found 22",
                     "--save_interval: expected 2, found 3"):  # fmt: skip
            assert part in said
        assert "Traceback" not in said


@pytest.mark.parametrize("rank_that_has_checkpoints", [0, 1])
def test_machines_with_a_disk_each_do_not_resume(rank_that_has_checkpoints, config, machines, tmp_path, monkeypatch):
    """Else one would fail, or all would start anew in silence."""
    config = dataclasses.replace(config, epochs=1)
    if rank_that_has_checkpoints == 0:
        assert run_ranks(config, 2) == [0, 0]
        original = resume.damage
        absent = lambda path, **_: original(tmp_path / "nowhere" if os.environ["RANK"] == "1" else path)  # noqa: E731
        monkeypatch.setattr(resume, "damage", absent)
    else:
        other = str(tmp_path / "other")
        assert run_ranks(dataclasses.replace(config, save_dir=other), 2) == [0, 0]
        machines(save_dir=other)
    assert run_ranks(resumed(config), 2) == [1, 1]
    for rank in range(2):
        said = said_by(config, rank)
        assert "rank 1 on" in said and "give a --save_dir on a disk that all machines share" in said
        assert "Traceback" not in said


def test_one_then_two_then_one_rank_read_the_same_samples_in_the_same_order(config, tmp_path, monkeypatch):
    log, original = tmp_path / "read", ConversationDataset.__getitem__

    def noted(self, index):
        with log.open("a") as file:  # one write a line, so ranks do not mix
            file.write(f"{os.environ.get('RANK', 0)} {index}\n")
        return original(self, index)

    def read() -> list[list[int]]:
        """What each step read, in the global order of its ranks' micro-batches."""
        pairs = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
        log.unlink()
        ranks = [[index for rank, index in pairs if rank == own] for own in range(2)]
        both = [list(pair) for pair in zip(*ranks, strict=True)] if ranks[1] else []
        return both or [ranks[0][n : n + 2] for n in range(0, len(ranks[0]), 2)]

    def leave_after(step):
        return lambda own, now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None

    monkeypatch.setattr(ConversationDataset, "__getitem__", noted)
    alone = dataclasses.replace(config, batch_size=2)
    reference = dataclasses.replace(alone, save_dir=str(tmp_path / "reference"))
    assert run_ranks(reference, 1) == [0]
    expected = read()
    assert len(expected) == 24
    taken = []
    stopped = 128 + signal.SIGTERM
    assert run_ranks(alone, 1, leave_after(7)) == [stopped]
    taken += read()
    assert run_ranks(resumed(config), 2, leave_after(15)) == [stopped, stopped]
    taken += read()
    assert run_ranks(resumed(alone), 1) == [0]
    taken += read()
    assert taken == expected
    losses = [[record["loss"] for record in records(run)] for run in (alone, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # dropout differs from rank to rank


def test_a_killed_reader_is_replaced_and_changes_nothing(tmp_path, unbroken, config):
    flag = tmp_path / "killed"
    original = ConversationDataset.__getitem__

    def killed_once(self, index):
        if index == 17 and not flag.exists():
            flag.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    config = dataclasses.replace(config, num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationDataset, "__getitem__", killed_once)
        assert run_ranks(config, 2) == [0, 0]
    assert flag.exists() and "a process that reads data was lost" in said_by(config, 0) + said_by(config, 1)
    assert outcome(config) == unbroken


def test_reader_that_hangs_is_given_up_in_time(tmp_path):
    """Replaced once; the second time the run ends. A slow one is waited for."""

    def never_answers(self, index):
        time.sleep(600)

    config = small_run(tmp_path, num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationDataset, "__getitem__", never_answers)
        patch.setattr(workers, "PATIENCE", 2)
        patch.setattr(data, "POLL", 1)
        patch.setattr(workers, "POLL", 1)
        started = time.monotonic()
        assert run_ranks(config, 1) == [1]
    assert 3 < time.monotonic() - started < 30
    assert "were lost twice" in said_by(config, 0) and "timed out" in said_by(config, 0)


NO_FILES_LEFT = "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"


@pytest.mark.parametrize(
    ("error", "said", "in_one_line"),
    [
        (RuntimeError("a slip of ours"), "RuntimeError: a slip of ours", False),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), "UnicodeDecodeError: 'utf-8' codec can't", False),
        (BadSample("texts.jsonl:18", "it has changed"), "llm: texts.jsonl:18: it has changed", True),
        (RuntimeError(NO_FILES_LEFT), f"{NO_FILES_LEFT}): allow more (ulimit -n", True),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files): allow more (ulimit -n", True),
    ],
    ids=["ours", "of several arguments", "the user's", "files of torch", "files"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_readers_own_is_told_as_what_it_is(num_workers, error, said, in_one_line, tmp_path):
    original = ConversationDataset.__getitem__

    def fails(self, index):
        if index == 17:
            raise error
        return original(self, index)

    config = small_run(tmp_path, num_workers=num_workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationDataset, "__getitem__", fails)
        assert run_ranks(config, 1) != [0]
    told = said_by(config, 0)
    assert said in told and ("Traceback" in told) != in_one_line
    assert "was lost" not in told and "out of memory" not in told


def test_readers_killed_again_and_again_end_the_run_with_the_cure(tmp_path):
    original = ConversationDataset.__getitem__

    def killed_always(self, index):
        if index == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    config = small_run(tmp_path, num_workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationDataset, "__getitem__", killed_always)
        assert run_ranks(config, 1) == [1]
    said = said_by(config, 0)
    assert "were lost twice" in said and "--num_workers" in said and "Traceback" not in said
