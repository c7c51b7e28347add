"""scripts/prepare_data.py: what is read back is what was given; stopped anywhere it goes on; no other file changes."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from dataset.formats import read_samples
from dataset.samples import DataError
from helpers.data import make_picture, turns, write_jsonl
from helpers.faults import KILLED, in_child
from scripts import prepare_data
from scripts.data import survey
from scripts.data.columns import MAX_FIELDS

WORDS = ("a cat", "a dog", "a bird")


@pytest.fixture(autouse=True)
def a_tokenizer_at_hand(tokenizer, monkeypatch):
    monkeypatch.setattr(survey, "load_tokenizer", lambda: tokenizer)


@pytest.fixture
def source(tmp_path) -> Path:
    """Three questions each about twenty pictures, one sample of two pictures, one of none, fields of all kinds."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    for number in range(20):
        kind = ("png", "jpg", "webp")[number % 3]
        make_picture(number).save(folder / "images" / f"{number}.{kind}")
    records = [
        {"image": path.name, "kind": word, "number": place, "conversations": turns(1, f"{word} {path.name}")}
        for path in sorted((folder / "images").iterdir())
        for place, word in enumerate(WORDS)
    ]
    records += [{"image": "0.png,1.jpg", "conversations": turns(2), "rating": 0.5, "tags": ["a"], "language": None},
                {"conversations": turns(0, "一只猫"), "good": True, "text_id": "\ud800", "images": "none"}]  # fmt: skip
    return write_jsonl_ascii(folder / "train.jsonl", records)


def write_jsonl_ascii(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def prepare(source, tmp_path):
    """prepare("--shuffle", ...): the folder that was made; source and output may be given."""

    def run(*flags: object, path: Path = source, output: Path = tmp_path / "prepared") -> Path:
        prepare_data.main([str(path), "--output", str(output), *map(str, flags)])
        return output

    return run


def refusal(prepare, *flags: object, **places: Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare(*flags, **places)
    sentence = str(stopped.value)
    assert sentence.startswith("prepare_data: ") and "\n" not in sentence
    return sentence


def shards_of(folder: Path, name: str = "train") -> list[Path]:
    return sorted(folder.glob(f"{name}-*.parquet"))


def rows_of(folder: Path, name: str = "train") -> list[dict]:
    return [row for path in shards_of(folder, name) for row in parquet.read_table(path).to_pylist()]


def words_of(folder: Path, name: str = "train") -> list[str]:
    return [json.loads(row["conversations"])[-1]["content"] for row in rows_of(folder, name)]


def pictures_of(folder: Path, name: str) -> set[str]:
    return {hashlib.sha256(picture).hexdigest() for row in rows_of(folder, name) for picture in row["image_bytes"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def index_of(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


# ---- what is read back


def test_what_is_read_back_is_what_was_given(prepare, source):
    before = contents(source.parent)
    folder = prepare()
    assert contents(source.parent) == before
    (path,) = shards_of(folder)
    given, found = list(read_samples(source)), list(read_samples(path))
    assert [sample.messages for sample in found] == [sample.messages for sample in given]
    for one, other in zip(found, given, strict=True):
        assert list(one.pictures) == [picture.read_bytes() for picture in other.pictures]
        for picture, wanted in zip(one.open_pictures(), other.open_pictures(), strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    for row, sample in zip(rows_of(folder), given, strict=True):
        fields = {name: value for name, value in row.items() if name not in ("conversations", "image_bytes", "extra")}
        fields |= json.loads(row["extra"] or "{}")
        wanted = {name: value for name, value in sample.extra.items() if value is not None}
        assert {name: value for name, value in fields.items() if value is not None} == wanted
    names = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert names == {"conversations": "string", "image_bytes": "list<element: binary>", "kind": "string",
                     "number": "int64", "rating": "double", "good": "bool", "extra": "string"}  # fmt: skip


def test_texts_have_a_column_of_their_own(prepare, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"There are {n} cats"} for n in range(20)])
    folder = prepare("--split", 0.2, path=path)
    assert {row["text"] for name in ("train", "held_out") for row in rows_of(folder, name)} == {
        f"There are {n} cats" for n in range(20)
    }
    assert list(rows_of(folder)[0]) == ["text"] and len(rows_of(folder, "held_out")) == 4
    mixed = [{"text": "a cat"}, {"conversations": turns(0)}]
    rows = rows_of(prepare(path=write_jsonl(tmp_path / "mixed.jsonl", mixed), output=tmp_path / "both"))
    assert rows[0] == {"conversations": None, "text": "a cat", "image_bytes": []}
    assert rows[1] == {"conversations": json.dumps(turns(0)), "text": None, "image_bytes": []}


def test_fields_of_several_kinds_and_too_many_fields_stand_together(prepare, tmp_path):
    first = {f"field_{number}": number for number in range(MAX_FIELDS + 5)}
    records = [{"conversations": turns(0), "a": 1, **first}, {"conversations": turns(0, "a dog"), "a": "one"},
               {"conversations": turns(0, "a bird"), "a": 1 << 70}]  # fmt: skip
    rows = rows_of(prepare(path=write_jsonl(tmp_path / "train.jsonl", records)))
    assert [json.loads(row["extra"])["a"] for row in rows] == [1, "one", 1 << 70] and "a" not in rows[0]
    assert rows[0][f"field_{MAX_FIELDS - 2}"] == MAX_FIELDS - 2 and len(json.loads(rows[0]["extra"])) == 7


def test_a_shard_is_read_by_row_groups_and_holds_a_picture_once(prepare, source, monkeypatch):
    monkeypatch.setattr("scripts.data.shards.GROUP_ROWS", 12)
    (path,) = shards_of(prepare())
    facts = parquet.read_metadata(path)
    assert [facts.row_group(number).num_rows for number in range(facts.num_row_groups)] == [12] * 5 + [2]
    column = next(c for c in map(facts.row_group(0).column, range(facts.num_columns)) if "image" in c.path_in_schema)
    assert column.compression == "UNCOMPRESSED" and "RLE_DICTIONARY" in column.encodings
    pictures = {picture for row in rows_of(path.parent)[:12] for picture in row["image_bytes"]}
    assert len(pictures) == 4 and column.total_compressed_size < 1.2 * sum(map(len, pictures)) + 500


def test_row_groups_are_cut_by_bytes(prepare, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("scripts.data.shards.GROUP_BYTES", 7000)
        (path,) = shards_of(prepare())
    facts = parquet.read_metadata(path)
    sizes = [facts.row_group(number).total_byte_size for number in range(facts.num_row_groups)]
    assert len(sizes) > 5 and max(sizes) < 9000


# ---- order and sides


def test_shuffled_the_questions_about_a_picture_stay_together(prepare, tmp_path):
    plain, one = words_of(prepare(output=tmp_path / "0")), words_of(prepare("--shuffle", output=tmp_path / "1"))
    assert one == words_of(prepare("--shuffle", output=tmp_path / "2")) != plain and sorted(one) == sorted(plain)
    assert one != words_of(prepare("--shuffle", "--seed", 7, output=tmp_path / "3"))
    pictures = [word.split()[-1] for word in one if "." in word]
    assert sum(a != b for a, b in zip(pictures, pictures[1:], strict=False)) == 19
    assert [word.rsplit(" ", 1)[0] for word in one if word.endswith(" 0.png")] == list(WORDS)  # in the order they had


def test_no_picture_stands_on_both_sides(prepare, source, tmp_path):
    shutil.copy(source.parent / "images" / "3.png", source.parent / "images" / "again.png")
    with source.open("a") as file:
        file.write(json.dumps({"image": "again.png", "conversations": turns(1)}) + "\n")
    for seed in range(5):
        folder = prepare("--split", 0.1, "--seed", seed, "--shuffle", output=tmp_path / str(seed))
        train, held_out = (pictures_of(folder, name) for name in ("train", "held_out"))
        assert not train & held_out and len(train | held_out) == 20
        assert 6 <= len(rows_of(folder, "held_out")) <= 12
        assert index_of(folder)["counts"]["held_out"] == len(rows_of(folder, "held_out"))


def test_a_split_that_holds_out_nothing_is_refused(prepare, tmp_path):
    assert "--split 1 must be" in refused_flags("--split", "1")
    (tmp_path / "images").mkdir()
    make_picture(1).save(tmp_path / "images" / "a.png")
    lines = [{"image": "a.png", "conversations": turns(1, f"answer {number}")} for number in range(20)]
    sentence = refusal(prepare, "--split", 0.1, path=write_jsonl(tmp_path / "one.jsonl", lines))
    assert (
        "about 2 of 20 samples, but the smallest group about the same pictures has 20: give a larger share" in sentence
    )


def refused_flags(*flags: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        prepare_data.parse(["a.jsonl", "--output", "b", *flags])
    return said.getvalue()


def test_duplicates_are_told_and_left_out_on_demand(prepare, source, tmp_path, capsys):
    shutil.copy(source.parent / "images" / "0.png", source.parent / "images" / "copy.png")
    first = json.loads(source.read_text().splitlines()[0])
    with source.open("a") as file:
        for change in ({"number": 99}, {"image": "copy.png"}, {"image": "1.jpg"}):
            file.write(json.dumps({**first, **change}) + "\n")
    assert len(rows_of(prepare(output=tmp_path / "all"))) == 65
    assert "with 2 samples that repeat an earlier one (--dedup exact leaves them out)" in capsys.readouterr().out
    folder = prepare("--dedup", "exact")
    assert len(rows_of(folder)) == 63 and index_of(folder)["counts"]["duplicates"] == 2
    left_out = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert left_out == [
        {"kind": "duplicate", "where": f"{source}:{line}", "reason": f"it says and shows the same as {source}:1"}
        for line in (63, 64)
    ]
    assert "left out 2 samples that repeat an earlier one" in capsys.readouterr().out


# ---- bad samples


def test_bad_samples_are_left_out_counted_and_named(prepare, source, capsys):
    (source.parent / "images" / "4.jpg").write_bytes((source.parent / "images" / "4.jpg").read_bytes()[:-60])
    lines = source.read_text().splitlines()
    lines[0], lines[10] = "nonsense", json.dumps({"conversations": [{"role": "nobody", "content": "?"}]})
    source.write_text("\n".join(lines))
    sentence = refusal(prepare)
    assert (
        "samples are bad, more than --max_bad_share 0.05 allows" in sentence and "left_out.jsonl names them" in sentence
    )
    folder = prepare("--max_bad_share", 0.2)
    left_out = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in left_out] == ["bad"] * 5
    assert [record["where"].rsplit(":")[-1] for record in left_out] == ["1", "11", "43", "44", "45"]
    assert len(rows_of(folder)) == 57 and index_of(folder)["counts"]["bad"] == 5
    assert "left out 5 bad samples, named in left_out.jsonl" in capsys.readouterr().out


# ---- stopped, and on again


def test_killed_at_any_write_it_goes_on_to_the_bit(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.data.plan.MEGABYTE", 20_000)
    flags = ("--shuffle", "--split", 0.1, "--shard_mb", 1)
    whole = contents(prepare(*flags, output=tmp_path / "whole"))
    assert len(whole) == 6
    with monkeypatch.context() as patched:
        calls = FaultyDisk(patched)
        prepare(*flags, output=tmp_path / "counted")
    assert contents(tmp_path / "counted") == whole and len(calls.trace) > 60
    for number in range(len(calls.trace)):
        folder = tmp_path / f"killed_{number}"

        def die(number: int = number, folder: Path = folder) -> None:
            FaultyDisk(monkeypatch, number, lambda: os._exit(KILLED))
            prepare(*flags, output=folder)

        assert in_child(die, tmp_path / "log") == KILLED
        prepare(*flags, output=folder)
        assert contents(folder) == whole, calls.trace[number]


class FaultyDisk:
    """Every call that changes the disk, in order; a fault can be put on the n-th, on a write when half is written."""

    def __init__(self, patch, fault_at: int = -1, fault: Callable[[], None] = lambda: None):
        self.trace: list[str] = []
        self.fault_at, self.fault = fault_at, fault
        for name in ("mkdir", "replace", "unlink", "fsync"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        opened = Path.open

        def open_path(path: Path, mode: str = "r", *arguments, **options):
            file = opened(path, mode, *arguments, **options)
            return FaultyFile(self, file) if "w" in mode else file

        patch.setattr(Path, "open", open_path)

    def happens(self, what: str) -> bool:
        self.trace.append(what)
        return len(self.trace) - 1 == self.fault_at

    def _wrapped(self, name: str, function: Callable) -> Callable:
        def call(path, *arguments, **options):
            if self.happens(f"{name} {path}"):
                self.fault()
            return function(path, *arguments, **options)

        return call


class FaultyFile:
    def __init__(self, disk: FaultyDisk, file):
        self.disk, self.file = disk, file

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.disk.happens(f"write {self.file.name}"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.disk.fault()
        return self.file.write(content)


def test_finished_shards_are_kept_and_nothing_is_looked_at_again(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.data.plan.MEGABYTE", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr("scripts.data.shards.Shards.write", stop_at("00002", "scripts.data.shards.Shards.write"))
        with pytest.raises(KeyboardInterrupt):
            prepare("--shard_mb", 1)
    capsys.readouterr()
    folder = tmp_path / "prepared"
    times = {path.name: path.stat().st_mtime_ns for path in shards_of(folder)}
    assert len(times) == 2 and not (folder / "index.json").exists()
    monkeypatch.setattr(survey.Surveyor, "run", lambda _: pytest.fail("looked at again"))
    prepare("--shard_mb", 1)
    assert "2 shards of 3 are there and whole" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    prepare("--shard_mb", 1)
    assert f"{folder} is complete: 62 samples to train on; 3 shards" in capsys.readouterr().out
    assert not (folder / "survey.npz").exists()


def stop_at(part: str, name: str):
    from scripts.data.shards import Shards

    write = Shards.write

    def write_or_stop(self, shard, on_row):
        if f"-{part}-of" in shard.name:
            raise KeyboardInterrupt
        return write(self, shard, on_row)

    return write_or_stop


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted", "of another run"])
def test_a_damaged_shard_is_found_and_written_again(damage, prepare, tmp_path, monkeypatch, source):
    monkeypatch.setattr("scripts.data.plan.MEGABYTE", 20_000)
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
    monkeypatch.setattr("scripts.data.shards.GROUP_ROWS", 16)
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
    monkeypatch.setattr("scripts.data.plan.MEGABYTE", 20_000)
    run = survey.Surveyor.run

    def run_and_change(self):
        found = run(self)
        make_picture(99).save(source.parent / "images" / "9.png")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(survey.Surveyor, "run", run_and_change)
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
    assert {**before, "other/train-00000-of-00001.parquet": b"somebody's"} == contents(tmp_path)


def test_a_full_disk_is_told_with_what_is_needed_and_free(prepare, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
        sentence = refusal(prepare)
    assert "needs about 0.1 MB more, and its disk has 0.1 MB free: make room" in sentence
    assert sorted(contents(tmp_path / "prepared")) == ["left_out.jsonl", "survey.npz"]


def test_a_disk_that_becomes_full_leaves_nothing_broken(prepare, tmp_path, monkeypatch):
    whole = contents(prepare(output=tmp_path / "whole"))
    with monkeypatch.context() as patched:
        calls = FaultyDisk(patched)
        prepare(output=tmp_path / "counted")
    writes = [number for number, what in enumerate(calls.trace) if what.startswith("write") and ".parquet" in what]

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in (writes[0], writes[len(writes) // 2], writes[-1]):
        folder = tmp_path / f"full_{number}"
        with monkeypatch.context() as patched:
            FaultyDisk(patched, number, full)
            sentence = refusal(prepare, output=folder)
        assert "MB more, and its disk has" in sentence
        assert sorted(contents(folder)) == ["left_out.jsonl", "survey.npz"]
        assert contents(prepare(output=folder)) == whole
