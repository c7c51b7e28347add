"""scripts/prepare_data.py stopped, damaged, refused: it goes on to the bit, and nothing else is touched."""

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset.readers.opening import read_samples
from dataset.samples import DataError
from helpers.data import make_picture, turns, write_jsonl
from helpers.faults import KILLED, FaultyDisk, in_child
from helpers.prepared import contents, refusal, shards_of, words_of
from scripts.data.prepare import first_look
from scripts.data.prepare.plan import Shard
from scripts.data.prepare.shards import Shards

# ---- stopped, and on again


def test_killed_at_any_write_it_goes_on_to_the_bit(prepare, source, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.prepare.plan.MEGABYTE", 5000)
    records = [{"image": f"{n}.png", "conversations": turns(1)} for n in (0, 3, 6)]
    path = write_jsonl(source.parent / "small.jsonl", [*records, records[1]])
    flags = ("--shuffle", "--split", 0.3, "--shard_mb", 1, "--dedup", "exact")
    whole = contents(prepare(*flags, path=path, output=tmp_path / "whole"))
    assert len(whole) == 4 and "held_out-00000-of-00001.parquet" in whole and whole["left_out.jsonl"]
    with monkeypatch.context() as patched:
        calls = FaultyDisk(patched)
        prepare(*flags, path=path, output=tmp_path / "counted")
    assert contents(tmp_path / "counted") == whole
    faults = calls.worth_a_try()
    assert len(faults) > 25
    for number in faults:
        folder = tmp_path / f"killed_{number}"

        def die(number: int = number, folder: Path = folder) -> None:
            FaultyDisk(monkeypatch, number, lambda: os._exit(KILLED))
            prepare(*flags, path=path, output=folder)

        assert in_child(die, tmp_path / "log") == KILLED
        prepare(*flags, path=path, output=folder)
        assert contents(folder) == whole, calls.trace[number]


def test_killed_while_it_replaces_nothing_of_the_former_shards_stays(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.prepare.plan.MEGABYTE", 20_000)
    fresh, former = contents(prepare("--shuffle", output=tmp_path / "fresh")), prepare("--shard_mb", 1)
    for number in range(8):
        folder = Path(shutil.copytree(former, tmp_path / f"killed_{number}"))

        def die(number: int = number, folder: Path = folder) -> None:
            FaultyDisk(monkeypatch, number, lambda: os._exit(KILLED))
            prepare("--shuffle", "--replace", output=folder)

        assert in_child(die, tmp_path / "log") == KILLED
        assert contents(prepare("--shuffle", "--replace", output=folder)) == fresh


def test_finished_shards_are_kept_and_nothing_is_looked_at_again(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.data.prepare.plan.MEGABYTE", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "write", stop_at("00002"))
        with pytest.raises(KeyboardInterrupt):
            prepare("--shard_mb", 1)
    capsys.readouterr()
    folder = tmp_path / "prepared"
    times = {path.name: path.stat().st_mtime_ns for path in shards_of(folder)}
    assert len(times) == 2 and not (folder / "index.json").exists()
    with pytest.raises(DataError, match="is not complete: give the same scripts/prepare_data.py command again"):
        read_samples(folder)
    monkeypatch.setattr(first_look.Surveyor, "run", lambda _: pytest.fail("looked at again"))
    prepare("--shard_mb", 1)
    assert "there and whole: 2 of 3 shards" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    prepare("--shard_mb", 1)
    assert f"{folder} is complete: 62 samples to train on; 3 shards" in capsys.readouterr().out
    assert not (folder / "survey.npz").exists()


def stop_at(part: str) -> Callable:
    write = Shards.write

    def write_or_stop(self: Shards, shard: Shard, on_row: Callable) -> None:
        if f"-{part}-of" in shard.name:
            raise KeyboardInterrupt
        write(self, shard, on_row)

    return write_or_stop


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted", "of another run"])
def test_a_damaged_shard_is_found_and_written_again(damage, prepare, tmp_path, monkeypatch, source):
    monkeypatch.setattr("scripts.data.prepare.plan.MEGABYTE", 20_000)
    folder = prepare("--shard_mb", 1)
    whole, path = contents(folder), shards_of(folder)[1]
    content = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "deleted":
        path.unlink()
    else:
        other = prepare("--shard_mb", 1, "--seed", 3, output=tmp_path / "other")
        shutil.copy(shards_of(other)[1], path)
    prepare("--shard_mb", 1)
    assert contents(folder) == whole


def test_no_bit_of_a_shard_flips_unseen(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.data.prepare.shards.GROUP_ROWS", 16)
    (path,) = shards_of(prepare())
    sound, chance, found = path.read_bytes(), random.Random(0), []
    wanted = list(read_samples(path))
    for _ in range(40):
        place = chance.randrange(len(sound))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << chance.randrange(8)]) + sound[place + 1 :])
        for copy in path.parent.glob("*.arrow"):
            copy.unlink()
        try:
            samples = read_samples(path)
            right = [number for number in range(len(samples)) if sample_or_none(samples, number) == wanted[number]]
            assert all(sample_or_none(samples, number) is None for number in set(range(62)) - set(right))
            found.append(62 - len(right))
        except DataError:
            found.append(62)
    assert sum(lost > 0 for lost in found) > 25


def sample_or_none(samples, number: int):
    with contextlib.suppress(DataError):
        return samples[number]


# ---- refused, with nothing changed


def test_other_options_or_data_are_refused_by_name_and_replaced_on_demand(prepare, source, tmp_path):
    folder = prepare("--shuffle")
    before = contents(folder)
    sentence = refusal(prepare, "--split", 0.1)
    assert "was made otherwise: --shuffle was True and is False; --split was 0.0 and is 0.1. Name another" in sentence
    source.write_text(source.read_text().replace("a bird", "two birds"))
    assert "was made otherwise: data was [" in refusal(prepare, "--shuffle") and contents(folder) == before
    (folder / "notes.txt").write_text("mine")
    prepare("--shuffle", "--replace")
    assert any("two birds" in word for word in words_of(folder)) and (folder / "notes.txt").read_text() == "mine"


def test_pictures_that_change_on_the_way_are_refused(prepare, source, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.prepare.plan.MEGABYTE", 20_000)
    run = first_look.Surveyor.run

    def run_and_change(self):
        found = run(self)
        make_picture(99).save(source.parent / "images" / "9.png")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(first_look.Surveyor, "run", run_and_change)
        sentence = refusal(prepare, "--shard_mb", 1)
    assert f"{source}:58 has changed since it was looked at: start again with --replace" in sentence
    assert "9.png has changed since it was looked at: start again with --replace" in refusal(prepare, "--shard_mb", 1)
    fresh = prepare("--shard_mb", 1, output=tmp_path / "fresh")
    assert contents(prepare("--shard_mb", 1, "--replace")) == contents(fresh)


def test_an_output_inside_the_data_or_another_folder_is_refused(prepare, source, tmp_path):
    before = contents(tmp_path)
    assert "lies inside" in refusal(prepare, output=source.parent / "images" / "prepared")
    assert "holds images, which this command has not made" in refusal(prepare, output=source.parent)
    assert "is no folder" in refusal(prepare, output=source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "train-00000-of-00001.parquet").write_text("somebody's")
    assert "which this command has not made" in refusal(prepare, "--replace", output=other)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text('{"made_by": "hand"}')
    assert "holds index.json, which this command has not made" in refusal(prepare, output=tmp_path / "index")
    others = {"other/train-00000-of-00001.parquet": b"somebody's", "index/index.json": b'{"made_by": "hand"}'}
    assert {**before, **others} == contents(tmp_path)


def test_a_full_disk_is_told_with_what_is_needed_and_free(prepare, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
        sentence = refusal(prepare)
    assert (
        "cannot take it (No space left on device): about 0.1 MB are still needed, 0.1 MB are free. Make room"
        in sentence
    )
    assert sorted(contents(tmp_path / "prepared")) == ["left_out.jsonl", "survey.npz"]


def test_a_disk_that_becomes_full_leaves_nothing_broken(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.prepare.shards.GROUP_ROWS", 20)
    whole = contents(prepare(output=tmp_path / "whole"))
    with monkeypatch.context() as patched:
        calls = FaultyDisk(patched)
        prepare(output=tmp_path / "counted")
    writes = [number for number, what in enumerate(calls.trace) if what.startswith("parquet")]

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in (writes[0], writes[len(writes) // 2], writes[-1]):
        folder = tmp_path / f"full_{number}"
        with monkeypatch.context() as patched:
            FaultyDisk(patched, number, full)
            sentence = refusal(prepare, output=folder)
        assert "(No space left on device): about " in sentence
        assert sorted(contents(folder)) == ["left_out.jsonl", "survey.npz"]
        assert contents(prepare(output=folder)) == whole
