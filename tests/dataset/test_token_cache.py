"""What was rendered once is read: equal in all that follows from it, never stale, never half written, made by one."""

import copy
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import samples, token_cache, vlm_dataset
from dataset.check import CheckedData
from dataset.quarantine import QUARANTINE, Quarantine
from dataset.readers.opening import read_samples
from dataset.samples import BadSample, DataError
from dataset.vlm_dataset import ConversationDataset
from helpers.data import make_picture, turns, write_jsonl, write_parquet
from helpers.faults import held_by_another, in_child, run_ranks, start_child, wait_for
from helpers.runs import losses, tiny
from model import process_lock
from model.processing import VLMProcessor
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

FORMAT_AND_DIGEST = (3, "6ae3380227c45f1f")
COLUMNS = [column.name for column in dataclasses.fields(CheckedData)]


@pytest.fixture(autouse=True)
def kept_however_small(monkeypatch):
    monkeypatch.setattr(vlm_dataset, "WORTH_KEEPING", 1)


@pytest.fixture
def path(data_folder) -> Path:
    """24 sound lines, and one of each kind that is left out; two questions about one picture; a text."""
    lines = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    lines += [
        {"image": "0_0.png", "conversations": turns(1, "a dog")},
        {"image": "0_0.png", "conversations": turns(1, "a bird")},
        {"text": "a cat @@@@ <image>"},
        {"image": "absent.png", "conversations": turns(1)},
        {"image": "folder", "conversations": turns(1)},
        {"conversations": [{"role": "nobody", "content": "?"}]},
        {"conversations": [{"role": "user", "content": "unanswered " * 400}, turns(0)[1]]},
    ]
    (data_folder / "images" / "folder").mkdir()
    return write_jsonl(data_folder / "train.jsonl", lines)


@dataclasses.dataclass
class Start:
    """What one start of a run found."""

    data: ConversationDataset
    said: list[str]
    quarantine: str  # the file's content
    counts: dict[str, int]


@pytest.fixture
def start(path, processor, tmp_path):
    """start(...): open the data with what is kept in tmp_path/tokens; folder=None: without."""

    def open_data(**changes) -> Start:
        given = {"path": path, "processor": processor, "max_seq_len": 400, "folder": tmp_path / "tokens", **changes}
        quarantine = Quarantine(tmp_path / QUARANTINE, strict=False, max_share=0.5)
        quarantine.begin(resumes=False)
        said = []
        data = ConversationDataset(
            read_samples(given["path"]), given["processor"], given["max_seq_len"], quarantine, given["folder"],
            said.append,
        )  # fmt: skip
        return Start(data, said, (tmp_path / QUARANTINE).read_text(), quarantine.counts())

    return open_data


def assert_alike(found: Start, wanted: Start) -> None:
    for name in COLUMNS:
        one, other = getattr(found.data.checked, name), getattr(wanted.data.checked, name)
        assert one.dtype == other.dtype and np.array_equal(one, other), name
    assert found.data.report == wanted.data.report and str(found.data.report) == str(wanted.data.report)
    assert (found.quarantine, found.counts) == (wanted.quarantine, wanted.counts)
    assert found.data.lengths.tolist() == wanted.data.lengths.tolist()
    for row in range(len(wanted.data)):
        (one, pixels, _), (other, other_pixels, _) = found.data[row], wanted.data[row]
        assert one == other and len(pixels) == len(other_pixels) and all(map(torch.equal, pixels, other_pixels))


def kept_in(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "tokens").iterdir())


def refuse(*_):
    raise AssertionError("rendered or opened again")


def test_a_second_start_renders_nothing_and_finds_the_same(start, monkeypatch, tmp_path):
    fresh, first = start(folder=None), start()
    assert (
        fresh.counts == {"bad": 3, "dropped": 1, "damaged": 0}
        and fresh.data.report.rows < fresh.data.report.conversations
    )
    assert not isinstance(fresh.data.ids.base, np.memmap) and first.said == []
    with monkeypatch.context() as patched:
        for name in ("render", "render_text"):
            patched.setattr(VLMProcessor, name, refuse)
        patched.setattr(samples, "open_picture", refuse)
        second = start()
    assert_alike(first, fresh)
    assert_alike(second, fresh)
    (name,) = kept_in(tmp_path)
    assert second.said == [f"rendered at an earlier start: {tmp_path / 'tokens' / name}"]
    assert not second.data.ids.flags.writeable


def test_the_same_for_parquet(start, folder, tmp_path, monkeypatch):
    picture = (folder / "images" / "0_0.png").read_bytes()
    texts = [json.dumps(turns(1)), "no JSON", json.dumps(turns(2)), json.dumps(turns(0))]
    path = write_parquet(tmp_path / "train.parquet", texts, [[picture], [], [picture, picture], []])
    fresh, _ = start(path=path, folder=None), start(path=path)
    monkeypatch.setattr(VLMProcessor, "render", refuse)
    assert_alike(start(path=path), fresh)
    assert fresh.data.checked.shown.tolist() == [0, 0, 0] and len(fresh.data.checked.names) == 1


@pytest.fixture
def folder(path) -> Path:
    return path.parent


def test_any_change_of_what_is_rendered_is_another_file(start, path, processor, tokenizer, monkeypatch, tmp_path):
    start()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["cat"])
    for number, changes in enumerate(
        ({"max_seq_len": 399}, {"processor": VLMProcessor(processor.tokenizer, 5, processor.image_size)},
         {"processor": VLMProcessor(tokenizer, processor.image_tokens, processor.image_size)}), 2,
    ):  # fmt: skip
        for _ in range(2):
            assert_alike(start(**changes), start(**changes, folder=None))
            assert len(kept_in(tmp_path)) == number
    facts, content = path.stat(), path.read_text()
    path.write_text(content.replace("number 7", "number 8"))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as long and as old as before
    assert_alike(start(), start(folder=None))
    assert len(kept_in(tmp_path)) == 5
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)  # as if the code had changed
    start()
    assert len(kept_in(tmp_path)) == 6


def test_what_is_kept_changes_only_with_its_format(start, folder):
    """The code has no part in the name of a file: whoever changes what it makes of data must say so."""
    checked, digest = start(folder=None).data.checked, hashlib.sha256()
    for name in COLUMNS:
        column = getattr(checked, name)
        if name == "rejected":
            digest.update(column.tobytes().replace(str(folder).encode(), b""))
        elif name not in ("names", "stamps", "prints"):  # paths, times, bytes that depend on the version of zlib
            digest.update(f"{name} {column.dtype} {column.shape}".encode() + column.tobytes())
    kept = (token_cache.FORMAT, digest.hexdigest()[:16])
    assert kept == FORMAT_AND_DIGEST, (
        "what the check makes of a data file has changed: bump FORMAT in dataset/token_cache.py, so that no run reads "
        f"what older code has kept, and write {kept} here"
    )


@pytest.mark.parametrize("change", ["deleted", "replaced", "mended", "mended folder"])
def test_pictures_that_change_are_looked_at_again(change, start, folder, tmp_path):
    start()
    images = folder / "images"
    if change == "deleted":
        (images / "3_0.png").unlink()
    elif change == "replaced":
        (images / "3_0.png").write_text("<html>")
    elif change == "mended":
        make_picture(5).save(images / "absent.png")
    else:
        (images / "folder").rmdir()
        (images / "folder").write_bytes((images / "0_0.png").read_bytes())
    found, wanted = start(), start(folder=None)
    assert len(found.said) == 1 and "has changed): rendering them again" in found.said[0]
    assert wanted.counts["bad"] == (4 if change in ("deleted", "replaced") else 2)
    assert_alike(found, wanted)
    assert start().said[0].startswith("rendered at an earlier start") and len(kept_in(tmp_path)) == 1


def test_a_picture_lost_after_the_start_is_damaged_in_training(start, folder):
    start()
    data = start().data
    row = next(row for row in range(len(data)) if data.samples[data.kept[row]].where.endswith(":4"))
    (folder / "images" / "3_0.png").unlink()
    rendered, _, (rejected,) = data[row]
    assert not any(rendered.trained)
    assert rejected.where == f"{folder / 'train.jsonl'}:4" and "does not exist" in rejected.reason
    (folder / "images" / "3_0.png").mkdir()
    assert data[row].rejected[0].where == data.where(row) == f"{folder / 'train.jsonl'}:4"


def test_what_a_run_allows_is_judged_at_every_start(start, path, processor, tmp_path):
    """The file holds all that was left out; strict runs and other shares refuse as if they had read it themselves."""
    start()
    for settings in ({"strict": True}, {"strict": False, "max_share": 0.01}):
        refusals = []
        for folder in (None, tmp_path / "tokens"):
            with pytest.raises(DataError) as refused:
                ConversationDataset(read_samples(path), processor, 400, Quarantine(**settings), folder, lambda _: None)
            refusals.append((type(refused.value), str(refused.value)))
        assert refusals[0] == refusals[1]
        assert refusals[0][0] is (BadSample if settings["strict"] else DataError)


def test_what_is_refused_is_not_kept(path, processor, tmp_path):
    with pytest.raises(DataError):
        ConversationDataset(read_samples(path), processor, 400, Quarantine(strict=True), tmp_path / "tokens")
    assert kept_in(tmp_path) == []


def test_damage_is_found_and_mended(start, tmp_path):
    fresh, _ = start(folder=None), start()
    (file,) = (tmp_path / "tokens").iterdir()
    whole, chance = file.read_bytes(), random.Random(0)
    places = [0, 7, 8, 30, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(15))]
    flipped = [whole[:n] + bytes([whole[n] ^ 1 << chance.randrange(8)]) + whole[n + 1 :] for n in places]
    for content in (
        *flipped,
        *(whole[:size] for size in (0, 5, 31, 64, len(whole) // 2, len(whole) - 1)),
        whole + b"0",
    ):
        file.write_bytes(content)
        found = start()
        assert len(found.said) == 1 and "cannot be used (" in found.said[0]
        assert file.read_bytes() == whole
    assert_alike(found, fresh)


def test_a_killed_write_leaves_nothing_that_counts(start, tmp_path, monkeypatch):
    fresh, calls = start(folder=None), ("write", "fsync", "replace", "fsync of the folder")
    for call in calls:
        child = in_child(lambda call=call: dies_at(call, monkeypatch, start), tmp_path / "log")
        assert child == 9
        assert any(name.endswith(".tokens") for name in kept_in(tmp_path)) == (call == calls[-1])
        assert any(name.endswith(".tmp") for name in kept_in(tmp_path)) == (call != calls[-1])
        found = start()
        assert found.said[:1] == [] or call == calls[-1]
        assert_alike(found, fresh)
        (name,) = [name for name in kept_in(tmp_path) if not name.endswith(".lock")]
        (tmp_path / "tokens" / name).unlink()


def dies_at(call: str, monkeypatch, start) -> None:
    def die(*_):
        os._exit(9)

    if call == "write":
        monkeypatch.setattr(token_cache.hashlib, "sha256", lambda *content, real=token_cache.hashlib.sha256: (
            real(*content) if content else namedtuple("Hash", "update")(die)
        ))  # fmt: skip
    elif call == "fsync of the folder":
        before = []
        monkeypatch.setattr(token_cache.os, "fsync", lambda _: die() if before else before.append(1))
    else:
        monkeypatch.setattr(token_cache.os, call, die)
    start()


def test_of_two_processes_one_renders(start, tmp_path, monkeypatch):
    fresh = start(folder=None)
    slowly(monkeypatch, 0.02)
    children = [start_child(lambda n=n: say_all(start), tmp_path / f"log_{n}") for n in range(2)]
    assert wait_for(children) == [0, 0]
    said = sorted([(tmp_path / f"log_{number}").read_text() for number in range(2)], key=len)
    assert said[0] == "[]\n" and "another process renders" in said[1] and "rendered at an earlier start" in said[1]
    assert_alike(start(), fresh)
    assert len(kept_in(tmp_path)) == 1


def test_who_waits_for_a_process_that_dies_renders_itself(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        slowly(patched, 5)
        child = start_child(start, tmp_path / "log")
        while not (tmp_path / "tokens").is_dir() or not kept_in(tmp_path):
            time.sleep(0.01)
    other = start_child(lambda: say_all(start), tmp_path / "other")
    time.sleep(0.5)
    assert not (tmp_path / "other").read_text()
    os.kill(child, signal.SIGKILL)
    assert wait_for([child, other]) == [-signal.SIGKILL, 0]
    assert (tmp_path / "other").read_text().count("another process renders") == 1


def slowly(monkeypatch, seconds: float) -> None:
    render = VLMProcessor.render
    monkeypatch.setattr(
        VLMProcessor, "render", lambda *arguments, **named: (time.sleep(seconds), render(*arguments, **named))[1]
    )


def say_all(start) -> None:
    print(start().said)


def test_a_process_that_shows_no_life_is_not_waited_for(start, tmp_path, monkeypatch):
    start()
    (file,) = (tmp_path / "tokens").iterdir()
    file.unlink()
    monkeypatch.setattr(process_lock, "PATIENCE", 0.3)
    monkeypatch.setattr(process_lock, "POLL", 0.02)
    with held_by_another(file.with_suffix(".lock")):
        found = start()
    assert len(found.said) == 1 and "another process renders the same data" in found.said[0]
    assert_alike(found, start(folder=None))
    assert not file.exists()


@pytest.mark.parametrize("trouble", ["no folder", "full"])
def test_a_disk_that_takes_nothing_is_told_and_the_run_goes_on(trouble, start, tmp_path, monkeypatch):
    fresh = start(folder=None)
    if trouble == "no folder":
        (tmp_path / "tokens").write_text("a file")
    else:
        usage = namedtuple("Usage", "total used free")(2000, 1000, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = start()
    (line,) = found.said
    assert line.startswith("the rendered tokens cannot be kept in ") and "\n" not in line
    assert_alike(found, fresh)
    assert trouble == "no folder" or kept_in(tmp_path) == []


def test_few_samples_are_not_kept(start, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_dataset, "WORTH_KEEPING", 32)
    assert start().said == [] and not (tmp_path / "tokens").exists()


# ---- a run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_learns_the_same_from_what_is_kept(ranks, path, folder, tower_folder, monkeypatch, capfd):
    config = tiny(SFT_VLM, folder, tower_folder, max_bad_share=0.5, cache_features="pixels")
    first = dataclasses.replace(config, name="first")
    run_ranks(first, ranks) if ranks > 1 else run_stage(first)
    (file,) = (Path(config.save_dir) / "tokens").iterdir()
    monkeypatch.setattr(VLMProcessor, "render", refuse)
    second = dataclasses.replace(config, name="second")
    assert run_ranks(second, ranks) == [0] * ranks
    assert losses(second) == losses(first)
    names = ("quarantine.jsonl", "status.json")
    (one, status), (other, other_status) = ([(c.run_dir / n).read_text() for n in names] for c in (first, second))
    assert one == other and len(one.splitlines()) == 4
    counts = [{k: v for k, v in json.loads(s).items() if k.startswith("samples")} for s in (status, other_status)]
    assert counts[0] == counts[1]
    assert [file] == list((Path(config.save_dir) / "tokens").iterdir())
