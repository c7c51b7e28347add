"""The copy of a parquet: small on disk and in memory, made by one, for whoever finds no room there is a sentence."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dataset.quarantine import Quarantine
from dataset.readers import parquet_copy, parquet_rows
from dataset.readers.opening import read_samples
from dataset.samples import BadSample, DataError
from helpers.data import BLACK, encoded, make_picture, turns, write_parquet
from helpers.faults import held_by_another, in_child, start_child, wait_for
from model import process_lock
from model.process_lock import ProcessLock
from trainer.config import StageConfig
from trainer.data import load_data


def like_minimind(path: Path, pictures: int, size: int, **options) -> tuple[list[str], list[bytes]]:
    """Each picture in four or five rows that follow each other, a twelfth of the rows text beside a black picture."""
    chance, texts, shown = random.Random(0), [], []
    for number in range(pictures):
        picture = chance.randbytes(chance.randint(size // 2, size * 3 // 2))
        for _ in range(chance.choice((4, 5))):
            is_text = chance.random() < 1 / 12
            texts.append(json.dumps(turns(not is_text, f"{number} {chance.randbytes(100).hex()}")))
            shown.append(BLACK if is_text else picture)
    table = pyarrow.table({"conversations": texts, "image_bytes": shown})
    parquet.write_table(table, path, use_dictionary=["image_bytes"], dictionary_pagesize_limit=1 << 30, **options)
    return texts, shown


def copies_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith((".arrow", ".tmp", ".lock")))


@pytest.fixture
def path(tmp_path) -> Path:
    like_minimind(tmp_path / "train.parquet", 20, 1000)
    return tmp_path / "train.parquet"


# ---- what it takes


@pytest.mark.parametrize("groups", [1, 7], ids=["one group", "seven"])
def test_each_picture_stands_once_however_many_rows_show_it(groups, tmp_path):
    path, said = tmp_path / "train.parquet", []
    texts, shown = like_minimind(path, 200, 3000, row_group_size=-(-900 // groups))
    samples = read_samples(path, say=said.append)
    assert [sample.messages for sample in samples] == [json.loads(text) for text in texts]
    assert [sample.pictures for sample in samples] == [() if one == BLACK else (one,) for one in shown]
    distinct, written = sum(map(len, set(shown))), samples.copy.stat().st_size
    assert distinct + sum(map(len, texts)) < written < distinct + sum(map(len, texts)) + 60 * len(texts) + 4000
    assert written < 1.5 * path.stat().st_size
    (line,) = said
    told = float(line.split(": ")[-1].split(" MB")[0])
    assert line.startswith(f"{path}: copied once") and told == pytest.approx(written / 1e6, abs=0.1)


def test_lists_that_share_pictures(tmp_path):
    pictures = [encoded(make_picture(number)) for number in range(3)]
    rows = [[0, 1], [1], [], [2, 0, 1], [1, 1]]
    lists = [[pictures[number] for number in row] for row in rows]
    samples = read_samples(write_parquet(tmp_path / "a.parquet", [json.dumps(turns(len(row))) for row in rows], lists))
    assert [list(sample.pictures) for sample in samples] == lists
    assert pyarrow.ipc.open_file(samples.copy).read_all()["pictures"].to_pylist() == [
        pictures[:2],
        [],
        [],
        [pictures[2]],
        [],
    ]


@pytest.mark.parametrize("kind", [
    pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()), pyarrow.list_(pyarrow.binary()),
    pyarrow.large_list(pyarrow.large_binary()),
])  # fmt: skip
def test_types_of_pictures(kind, tmp_path):
    content = encoded(make_picture(0))
    cells = [content, None, content]
    cells = [[cell] for cell in cells] if hasattr(kind, "value_field") else cells
    column = pyarrow.array(cells, kind) if not pyarrow.types.is_dictionary(kind) else pyarrow.array(cells).cast(kind)
    texts = pyarrow.array([json.dumps(turns(count)) for count in (1, 0, 1)]).dictionary_encode()
    samples = read_samples(write_parquet(tmp_path / "a.parquet", texts, column, row_group_size=2))
    assert [sample.pictures for sample in samples] == [(content,), (), (content,)]


def kilobytes(name: str) -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory was used at most")
def test_copying_and_reading_takes_less_memory_than_one_and_a_half_times_the_file(path, tmp_path):
    large = tmp_path / "large.parquet"
    texts, shown = like_minimind(large, 8000, 6500, row_group_size=4096)
    total = len(texts) - shown.count(BLACK)
    del texts, shown
    list(read_samples(path))  # what is loaded once is no growth

    def use_every_row():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = kilobytes("VmRSS")
        rows = read_samples(large)
        assert sum(len(rows[number].pictures) for number in range(len(rows))) == total
        print(kilobytes("VmHWM") - before)

    assert in_child(use_every_row, tmp_path / "log") == 0
    grown = 1024 * int((tmp_path / "log").read_text().split()[-1])
    assert large.stat().st_size / 2 < grown < 1.5 * large.stat().st_size


def test_a_group_that_turns_out_damaged_at_its_end_is_left_out_as_a_whole(tmp_path):
    path = tmp_path / "train.parquet"
    texts, shown = like_minimind(path, 200, 1000, row_group_size=300, write_page_checksum=True, data_page_size=2000)
    facts = parquet.ParquetFile(path).metadata.row_group(1).column(0)  # the texts: many pages
    last = facts.data_page_offset + facts.total_compressed_size - 50
    content = path.read_bytes()
    path.write_bytes(content[:last] + bytes(40) + content[last + 40 :])
    samples = read_samples(path)
    assert len(samples) == len(texts)
    for number, (text, picture) in enumerate(zip(texts, shown, strict=True)):
        if 300 <= number < 600:
            with pytest.raises(BadSample, match=rf"{number + 1}: row group 1 cannot be read .*download the file again"):
                samples[number]
        else:
            assert samples[number].messages == json.loads(text)
            assert samples[number].pictures == (() if picture == BLACK else (picture,))


def test_a_group_that_knows_its_column_by_no_name_at_all(path):
    wanted, content = list(read_samples(path)), path.read_bytes()
    place = content.rindex(b"image_bytes")  # in the facts of the last group
    path.write_bytes(content[:place] + b"\xe9" + content[place + 1 :])
    assert list(read_samples(path)) == wanted


def test_lists_of_lists_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [json.dumps(turns(1))], [[[BLACK]]])
    with pytest.raises(
        DataError,
        match="'image_bytes' must be bytes of pictures, names of their files, or lists of either, it is list<",
    ):
        read_samples(path)


# ---- where it lies


def no_folder_takes(monkeypatch, folder: Path, code: int = errno.EROFS) -> None:
    """As if the folder could not be written: tests may run as root, whom no permission stops."""

    acquire = ProcessLock.acquire

    def acquire_elsewhere(lock: ProcessLock) -> bool:
        if lock.path.parent == folder:
            raise OSError(code, os.strerror(code))
        return acquire(lock)

    monkeypatch.setattr(ProcessLock, "acquire", acquire_elsewhere)


def test_a_parquet_in_a_folder_that_cannot_be_written_is_copied_elsewhere(path, tmp_path, monkeypatch):
    wanted = list(read_samples(path))
    copy, elsewhere = next(tmp_path.glob("*.arrow")), tmp_path / "out" / "rows"
    copy.unlink()
    no_folder_takes(monkeypatch, tmp_path)
    samples = read_samples(path, copies=elsewhere)
    assert list(samples) == wanted and samples.copy.parent == elsewhere and copies_in(tmp_path) == []
    monkeypatch.setattr(parquet.ParquetFile, "__init__", None)  # reading the original would fail
    assert list(read_samples(path, copies=elsewhere)) == wanted and len(copies_in(elsewhere)) == 1


def test_parquets_of_one_name_from_two_folders_have_two_copies(tmp_path, monkeypatch):
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_parquet(folder / "train.parquet", [json.dumps(turns(0, name))], [None])
        os.utime(folder / "train.parquet", (1, 1))
        no_folder_takes(monkeypatch, folder)
        found.append(read_samples(folder / "train.parquet", copies=tmp_path / "rows")[0].messages)
    assert found == [turns(0, "a"), turns(0, "b")]


def test_a_stage_copies_under_its_save_dir(path, tmp_path, processor, monkeypatch):
    no_folder_takes(monkeypatch, tmp_path)
    write_parquet(path, [json.dumps(turns(0))] * 30, [None] * 30)
    config = StageConfig(data_path=str(path), save_dir=str(tmp_path / "save"), max_seq_len=64)
    load_data(config, processor, Quarantine(), lambda _: None)
    assert len(copies_in(tmp_path / "save" / "rows")) == 1


def test_former_copies_are_not_read_and_go(path, tmp_path):
    facts, said = path.stat(), []
    state = f"{facts.st_size}-{facts.st_mtime_ns}.rows"
    former = [f"train.parquet.{state}.arrow", f"train.parquet.{state}-1.arrow", "train.parquet.1-2.rows-2.arrow"]
    others = ["train.parquet.old.arrow", "other.parquet.1-2.rows.arrow", "my.train.parquet.1-2.rows.arrow"]
    for name in (*former, *others):
        (tmp_path / name).write_bytes(b"")
    copy = read_samples(path, say=said.append).copy
    assert copies_in(tmp_path) == sorted([*others, copy.name])
    assert sum(line.startswith("deleting ") for line in said) == 3


def test_half_a_copy_is_made_again(path):
    samples = read_samples(path)
    wanted, content = list(samples), samples.copy.read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 1):
        samples.copy.write_bytes(content[:cut])
        assert list(read_samples(path)) == wanted


# ---- full disks


def test_too_little_room_is_found_before_anything_is_written(path, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    monkeypatch.setattr(parquet_copy, "_write", None)  # would fail
    with pytest.raises(DataError, match=r"needs about 0\.1 MB, but .*No space left on device, 0\.0 MB are free.* and "
                                        r".*/rows cannot take it .*: make room, or give a --save_dir"):  # fmt: skip
        read_samples(path, copies=tmp_path / "rows")
    assert copies_in(tmp_path) == copies_in(tmp_path / "rows") == []


def test_a_disk_that_fills_while_the_copy_is_written_is_told(path, tmp_path):
    def read_within_4_kb():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        read_samples(path, copies=tmp_path / "rows")

    log = tmp_path.with_suffix(".log")
    assert in_child(read_within_4_kb, log) == 70
    assert "MB, but " in log.read_text() and "File too large" in log.read_text() and "MB are free" in log.read_text()
    assert "download it again" not in log.read_text()
    assert copies_in(tmp_path) == copies_in(tmp_path / "rows") == []


# ---- one writes, the others wait


def slowly(monkeypatch, seconds: float) -> None:
    write = parquet_copy._write
    monkeypatch.setattr(
        parquet_copy, "_write", lambda *arguments: (time.sleep(seconds), print("writes"), write(*arguments))
    )


def test_of_three_processes_one_writes(path, tmp_path, monkeypatch):
    slowly(monkeypatch, 0.5)
    logs = [tmp_path / f"log_{number}" for number in range(3)]
    assert wait_for([start_child(lambda: len(read_samples(path)), log) for log in logs]) == [0, 0, 0]
    said = "".join(log.read_text() for log in logs)
    assert said.count("writes") == 1 and said.count("another process copies ") == 2
    assert len(copies_in(tmp_path)) == 1


def test_who_waits_for_a_process_that_dies_writes_itself(path, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_copy.os, "replace", lambda *_: time.sleep(60))
    child = start_child(lambda: read_samples(path), tmp_path / "log")
    while not list(tmp_path.glob(".*.tmp")):
        time.sleep(0.01)
    monkeypatch.undo()
    other = start_child(lambda: len(read_samples(path)), tmp_path / "other")
    while not (tmp_path / "other").exists() or "another process" not in (tmp_path / "other").read_text():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert wait_for([child, other]) == [-signal.SIGKILL, 0]
    assert len(copies_in(tmp_path)) == 1


def test_a_writer_that_shows_no_life_is_told(path, tmp_path, monkeypatch):
    samples = read_samples(path)
    samples.copy.unlink()
    monkeypatch.setattr(process_lock, "PATIENCE", 0.2)
    monkeypatch.setattr(process_lock, "POLL", 0.02)
    with (
        held_by_another(samples.copy.with_name(f".{samples.copy.name}.lock")),
        pytest.raises(DataError, match=r"shown no sign of life for .* end it, and start again"),
    ):
        read_samples(path, say=lambda _: None)
    assert len(read_samples(path)) == len(samples)


def test_a_writer_shows_that_it_lives(path, monkeypatch):
    signs = []
    monkeypatch.setattr(ProcessLock, "show_life", lambda lock: signs.append(lock))
    read_samples(path)
    assert signs


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="memory as Linux tells it")
def test_rows_that_were_read_do_not_stay_mapped(tmp_path, monkeypatch):
    """Else memory would grow by the whole file, in every process that reads."""
    monkeypatch.setattr(parquet_rows, "KEPT_MAPPED", 4)
    pictures = [bytes([number]) * 200_000 for number in range(60)]
    path = write_parquet(tmp_path / "train.parquet", [json.dumps(turns(1))] * 60, pictures)
    samples = read_samples(path, say=lambda _: None)
    assert [sample.pictures for sample in samples] == [(picture,) for picture in pictures]

    def mapped() -> int:
        """Bytes."""
        maps = Path("/proc/self/smaps").read_text().partition(samples.copy.name)[2]
        return 1024 * int(maps.partition("Rss:")[2].split()[0])

    assert mapped() < 3_000_000 < samples.copy.stat().st_size
