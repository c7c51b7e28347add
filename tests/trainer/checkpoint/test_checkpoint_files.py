"""Checkpoints on a disk that fails: whatever happens, the old or the new one loads, and damage is never loaded."""

import errno
import math
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.faults import KILLED, Calls, in_child
from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.files import Snapshot, checkpoints_in, damage, newest_checkpoint, write_checkpoint


def snapshot(step: int, val_loss: float | None = None, size: int = 50) -> Snapshot:
    """A checkpoint of a few hundred bytes whose every tensor holds its step."""
    tensors = {name: torch.full((size,), float(step)) for name in ("a", "b")}
    moments = {f"exp_avg/{name}": value + 0.5 for name, value in tensors.items()}
    facts = {"step": step, "position": 8 * step, "val_loss": val_loss, "fingerprints": {"stage": "test"}}
    return Snapshot(tensors, moments, {"step": step, "ranks": []}, facts)


def examined(step: int, exam: float | None, val_loss: float | None) -> Snapshot:
    made = snapshot(step, val_loss)
    return made if exam is None else Snapshot(made.trained, made.optimizer, made.state, {**made.facts, "exam": exam})


def step_of(path: Path) -> int:
    """The step that a whole checkpoint holds, the same in its name and in each of its files."""
    steps = {int(path.name[5:]), checkpoint.read_manifest(path)["step"], checkpoint.load_state(path)["step"]}
    steps |= {int(value[0]) for value in load_file(path / checkpoint.TRAINED).values()}
    steps |= {int(value[0]) for value in load_file(path / checkpoint.OPTIMIZER).values()}
    assert len(steps) == 1
    return steps.pop()


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints_in(folder)]


def silent(*_) -> None:
    pass


def calls_of_a_save(step: int, folder: Path, monkeypatch, keep_last: int = 2) -> list[tuple[str, str]]:
    """What the save of `step` does to the disk, after those of all steps before."""
    for earlier in range(1, step):
        write_checkpoint(folder, snapshot(earlier), keep_last=2)
    with monkeypatch.context() as patch:
        trace = Calls(patch).trace
        write_checkpoint(folder, snapshot(step), keep_last=keep_last)
    return trace


# ---- death at every call


@pytest.mark.parametrize("steps_before", [(), (1, 2)], ids=["first save", "save and rotation"])
def test_death_at_every_call_leaves_the_old_or_the_new(steps_before, tmp_path, monkeypatch):
    def save_the_third(folder: Path, fault_at: int) -> list:
        with monkeypatch.context() as patch:
            calls = Calls(patch, fault_at)
            write_checkpoint(folder, snapshot(3), keep_last=2, say=silent)
        return calls.trace

    prepared = tmp_path / "prepared"
    for step in steps_before:
        write_checkpoint(prepared, snapshot(step), keep_last=2)
    newest_before = max(steps_before, default=None)
    tried = tmp_path / "tried"
    if steps_before:
        shutil.copytree(prepared, tried)
    total = len(save_the_third(tried, fault_at=-1))
    assert steps_in(tried) == [*steps_before, 3][-2:] and total >= 17
    found = set()
    for n in range(total):
        folder = tmp_path / f"death_{n}"
        if steps_before:
            shutil.copytree(prepared, folder)
        assert in_child(lambda folder=folder, n=n: save_the_third(folder, n), tmp_path / "log") == KILLED
        assert [damage(path) for path in checkpoints_in(folder)] == [None] * len(checkpoints_in(folder))
        newest = newest_checkpoint(folder, silent)
        found.add(newest and step_of(newest))
        assert found <= {newest_before, 3}
        write_checkpoint(folder, snapshot(4), keep_last=2, say=silent)  # the next run saves, and clears away the litter
        assert steps_in(folder)[-1] == 4 and len(list(folder.iterdir())) == len(steps_in(folder)) == min(
            2, len(steps_in(folder))
        )
    assert found == {newest_before, 3}  # some died before the new one was there, some after


def test_files_are_on_disk_before_the_name_and_the_name_before_anything_is_deleted(tmp_path, monkeypatch):
    trace = calls_of_a_save(3, tmp_path, monkeypatch)
    names = [(name, Path(path).name) for name, path in trace]
    files = (checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST)
    aside = f".tmp-3-{os.getpid()}"
    renamed = names.index(("rename", aside))
    for file in files:
        written = max(n for n, call in enumerate(names) if call == ("write", file))
        assert written < names.index(("fsync", file)) < names.index(("fsync", aside)) < renamed
    settled = names.index(("fsync", tmp_path.name))
    assert renamed < settled < names.index(("rename", "step-00000001"))
    assert all(n > settled for n, (name, _) in enumerate(names) if name in ("unlink", "rmdir"))


# ---- damage


def test_300_flipped_bits_and_100_truncations_are_all_seen(tmp_path):
    chance = random.Random(0)
    whole = write_checkpoint(tmp_path / "whole", snapshot(7, val_loss=1.25), keep_last=1)
    files = sorted(whole.iterdir())
    assert len(files) == 4
    damaged = tmp_path / "damaged" / whole.name
    shutil.copytree(whole, damaged)
    seen = 0
    for n in range(400):
        file = files[n % 4]
        content = bytearray(file.read_bytes())
        if n < 300:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        (damaged / file.name).write_bytes(content)
        reason = damage(damaged)
        assert reason and reason.startswith(file.name), (n, reason)
        seen += 1
        shutil.copyfile(file, damaged / file.name)
        assert n % 40 or damage(damaged) is None
    assert seen == 400


@pytest.mark.parametrize("name", [checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
def test_missing_empty_and_short_files_are_named_and_the_one_before_is_used(name, tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, snapshot(step), keep_last=2)
    newest, content, said = tmp_path / "step-00000002", (tmp_path / "step-00000002" / name).read_bytes(), []
    for spoil in (lambda f: f.unlink(), lambda f: f.write_bytes(b""), lambda f: f.write_bytes(content[:-1])):
        spoil(newest / name)
        said.clear()
        assert step_of(newest_checkpoint(tmp_path, said.append)) == 1
        assert len(said) == 1 and str(newest) in said[0] and name in said[0]
    (newest / name).write_bytes(content)
    assert step_of(newest_checkpoint(tmp_path)) == 2


def test_when_none_is_whole_it_refuses_with_every_reason(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, snapshot(step), keep_last=2)
    os.truncate(tmp_path / "step-00000001" / checkpoint.TRAINED, 5)
    (tmp_path / "step-00000002" / checkpoint.MANIFEST).unlink()
    with pytest.raises(
        ValueError, match="manifest.json.*step-00000001 .trained.safetensors has 5 of .*--from_resume 0"
    ):
        newest_checkpoint(tmp_path, silent)
    assert newest_checkpoint(tmp_path / "empty") is None


def test_a_pickle_is_never_opened(tmp_path, tiny_config):
    """Not under any of our names, not even with a manifest that fits."""
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for name in (checkpoint.TRAINED, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST):
        path = write_checkpoint(tmp_path / name, snapshot(1), keep_last=1)
        torch.save(Hostile(), path / name)
        if name != checkpoint.MANIFEST:
            manifest = checkpoint.read_manifest(path)
            size = {"bytes": (path / name).stat().st_size, "sha256": checkpoint.file_sha256(path / name)}
            manifest["files"][name] = size
            text = checkpoint.json.dumps({**manifest, "sha256": checkpoint._digest(manifest)})
            (path / checkpoint.MANIFEST).write_text(text)
            assert damage(path) is None
        else:
            assert damage(path).startswith(name)
        linear = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match=name):
            checkpoint.load_tensors(path, linear, torch.optim.SGD(linear.parameters()))
            checkpoint.load_state(path)
            checkpoint.read_manifest(path)
    assert not marker.exists()


# ---- the disk is full, or will not let go


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_every_call_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch):
    trace = calls_of_a_save(2, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "step-00000002")
    writes = [n for n, (name, _) in enumerate(trace) if name in ("mkdir", "create", "write", "fsync")][:-1]
    assert len(writes) >= 12
    for n in writes:
        with monkeypatch.context() as patch:
            Calls(patch, n, no_space)
            with pytest.raises(checkpoint.DiskFull, match="needs .* MB, .* MB can be written in"):
                write_checkpoint(tmp_path, snapshot(2), keep_last=2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and steps_in(tmp_path) == [1]
    write_checkpoint(tmp_path, snapshot(2), keep_last=2)  # room again
    assert steps_in(tmp_path) == [1, 2]


def test_a_real_limit_on_file_sizes_is_told_and_leaves_the_old_one(tmp_path):
    write_checkpoint(tmp_path, snapshot(1), keep_last=2)

    def save_within_4_kb():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        write_checkpoint(tmp_path, snapshot(2, size=5000), keep_last=2)

    log = tmp_path.with_suffix(".log")
    assert in_child(save_within_4_kb, log) == 70
    assert "DiskFull: a checkpoint needs 0.1 MB" in log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and steps_in(tmp_path) == [1]


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(checkpoint.DiskFull, match="needs 0.0 MB, 0.0 MB can be written"):
        write_checkpoint(tmp_path, snapshot(2), keep_last=2)
    assert not list(tmp_path.iterdir())


def test_what_reads_back_differently_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_sha256", lambda _: "0" * 64)
    with pytest.raises(OSError, match="reads back other than it was written"):
        write_checkpoint(tmp_path, snapshot(2), keep_last=2)
    assert not list(tmp_path.iterdir())


# ---- rotation


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 1.5, 1.0], 1):
        write_checkpoint(tmp_path, snapshot(step, loss), keep_last=2)
    assert steps_in(tmp_path) == [2, 5, 6]


def test_rotation_keeps_the_best_beside_losses_that_are_no_number(tmp_path):
    """As older versions wrote them: NaN is below nothing, yet `min` returns it where it comes first."""
    for step, loss in enumerate([math.nan, 1.0, 2.0, math.nan, math.inf, 3.0], 1):
        write_checkpoint(tmp_path, snapshot(step, loss), keep_last=2)
    assert steps_in(tmp_path) == [2, 5, 6]


def test_broken_folders_do_not_count_as_kept(tmp_path):
    write_checkpoint(tmp_path, snapshot(1), keep_last=2)
    for step in (2, 3, 4):
        path = write_checkpoint(tmp_path, snapshot(step), keep_last=9)
        os.truncate(path / checkpoint.OPTIMIZER, 10)
    write_checkpoint(tmp_path, snapshot(5), keep_last=2, say=silent)
    assert step_of(newest_checkpoint(tmp_path)) == 5
    shutil.rmtree(tmp_path / "step-00000005")
    assert step_of(newest_checkpoint(tmp_path, silent)) == 1


def test_old_one_that_cannot_be_deleted_is_told_and_no_obstacle(tmp_path, monkeypatch):
    trace = calls_of_a_save(3, tmp_path, monkeypatch, keep_last=9)
    said, renames = [], [n for n, (name, _) in enumerate(trace) if name == "rename"]

    def refuse():
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        Calls(patch, renames[0] + 2, refuse)  # the rename of the old one, after the rename of the new and its fsync
        write_checkpoint(tmp_path, snapshot(4), keep_last=1, say=said.append)
    assert len(said) == 1 and "cannot be deleted (Permission denied); training goes on" in said[0]
    assert steps_in(tmp_path)[-1] == 4


@pytest.mark.parametrize(
    ("saves", "best"),
    [
        ([(None, 2.0), (None, 1.0), (None, 3.0)], 2),
        ([(0.5, 2.0), (0.75, 3.0), (0.25, 1.0)], 2),
        ([(0.5, 2.0), (0.5, 1.0), (0.5, 3.0)], 2),
        ([(0.5, 9.0), (None, 1.0), (0.0, None)], 1),  # without an exam it is never before one with
        ([(0.0, None), (None, 1.0), (0.0, 2.0)], 3),
        ([(None, None), (None, None)], None),
    ],
)
def test_the_best_is_by_its_exam_then_by_its_loss(saves, best, tmp_path):
    for step, (exam, loss) in enumerate(saves, 1):
        write_checkpoint(tmp_path, examined(step, exam, loss), keep_last=9)
    found = checkpoint.best_of(checkpoints_in(tmp_path))
    assert (found and step_of(found)) == best
