"""Pictures read out of archives: nothing is unpacked, nothing hostile is read, what is damaged is named."""

import gzip
import io
import os
import pickle
import random
import resource
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from dataset.options import ReadOptions
from dataset.readers import archives
from dataset.readers.archives import MAX_MEMBER, Archive
from dataset.readers.opening import read_samples
from dataset.samples import BadSample, DataError
from dataset.vlm_dataset import ConversationDataset
from helpers.data import TURNS, encoded, make_picture, write_jsonl
from helpers.formats import save_tar, save_zip
from helpers.zoo import lenient
from model.processing import collate_training

PICTURE = encoded(make_picture(0), "PNG")


def add(tar: tarfile.TarFile, name: str, content: bytes = PICTURE, **facts) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(content))


def hostile_tar(path: Path) -> dict[str, str]:
    """Names and pieces of the reasons; `a.png` and `deep/a.png` are sound."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "./a.png")
        add(tar, "deep/a.png")
        add(tar, "../evil.png")
        add(tar, "/abs.png")
        add(tar, "deep/../../evil2.png")
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "device.png", b"", type=tarfile.CHRTYPE)
        add(tar, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add(tar, "twice.png")
        add(tar, "twice.png", encoded(make_picture(1), "PNG"))
        add(tar, "no picture.png", b"<html>")
        add(tar, "猫 " + "x" * 200 + ".png")
    return {
        "../evil.png": "leads out", "/abs.png": "leads out", "deep/../../evil2.png": "leads out",
        "link.png": "a link", "hard.png": "a link", "device.png": "a device", "pipe.png": "a device",
        "twice.png": "two members have this name", "no picture.png": "cannot be read as a picture",
        "absent/a.png": "it has a.png", "absent.png": "check --images_path",
    }  # fmt: skip


def hostile_zip(path: Path) -> dict[str, str]:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("./a.png", "deep/a.png", "../evil.png", "/abs.png", "twice.png", "no picture.png"):
            archive.writestr(name, b"<html>" if name.startswith("no") else PICTURE)
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning):
            archive.writestr("twice.png", PICTURE)
        archive.writestr("bomb.png", bytes(MAX_MEMBER + 1))
        archive.writestr("lzma.png", PICTURE, zipfile.ZIP_LZMA)
        archive.writestr("猫 " + "x" * 200 + ".png", PICTURE)
        archive.mkdir("folder.png")
    content = bytearray(path.read_bytes())
    secret = content.rindex(b"no picture.png") - 46  # its entry in the list at the end: claim that it is encrypted
    content[secret + 8] |= 1
    path.write_bytes(content)
    return {
        "../evil.png": "leads out", "/abs.png": "leads out", "link.png": "it is a link",
        "twice.png": "two members have this name", "no picture.png": "encrypted", "lzma.png": "compression, number 14",
        "bomb.png": f"{MAX_MEMBER + 1:,} bytes, more than", "folder.png": "check --images_path",
        "absent/a.png": "it has a.png",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_nothing_hostile_is_read_and_nothing_is_written(kind, tmp_path, processor):
    path = tmp_path / "in" / f"images.{kind}"
    path.parent.mkdir()
    wanted = {"tar": hostile_tar, "zip": hostile_zip}[kind](path)
    sound = ["a.png", "deep/a.png", "./a.png", "deep/./a.png", "猫 " + "x" * 200 + ".png"]
    records = [{"image": [name], "conversations": TURNS} for name in (*sound, *wanted)]
    lines = write_jsonl(tmp_path / "in" / "train.jsonl", records)
    before = sorted(tmp_path.rglob("*"))
    data = ConversationDataset(read_samples(lines, ReadOptions(images_path=str(path))), processor, 64, lenient())
    assert data.report.conversations == len(sound)
    found = {rejected.where: rejected.reason for rejected in data.report.bad}
    places = {f"{lines}:{number}": reason for number, reason in enumerate(wanted.values(), len(sound) + 1)}
    assert found.keys() == places.keys()
    assert {where: reason for where, reason in found.items() if places[where] not in reason} == {}
    assert sorted(tmp_path.rglob("*")) == before


def zip_that_lies(path: Path, size: int, claimed: int) -> Path:
    """With a member of `size` zeros that says that it has others, in both of its headers."""
    save_zip(path, {"a.png": bytes(size)})
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = content.index(mark) + at
        content[place : place + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def test_bombs_that_lie_about_their_size_cost_no_memory(tmp_path):
    archive = Archive(zip_that_lies(tmp_path / "lie.zip", 300_000_000, 1000))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(
        BadSample, match=r"t:1: picture 'a\.png' in .*lie\.zip cannot be read \(it has 1,001 bytes or more"
    ):
        archive.find("t:1", "a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert time.perf_counter() - start < 5
    archive = Archive(zip_that_lies(tmp_path / "short.zip", 1000, 5000))
    with pytest.raises(BadSample, match="it has 1,000 bytes or more instead of 5,000"):
        archive.find("t:1", "a.png")


def test_every_flipped_bit_of_a_zip_is_found(tmp_path):
    path = save_zip(tmp_path / "a.zip", {"a.png": PICTURE, "b.png": PICTURE[::-1]})
    sound, found = path.read_bytes(), 0
    for place in random.Random(0).sample(range(len(sound)), 300):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 16]) + sound[place + 1 :])
        try:
            contents = [Archive(path).find("t:1", name) for name in ("a.png", "b.png")]
            assert contents == [PICTURE, PICTURE[::-1]]  # where nothing hangs on it: dates, versions
        except (BadSample, DataError):
            found += 1
    assert found > 200


@pytest.mark.parametrize("cut", [0, 3, 700, -1024, -700, -30])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_that_are_cut_short(kind, cut, tmp_path):
    files = {"a.png": PICTURE, "b.png": PICTURE}
    path = tmp_path / f"cut.{kind}"
    save_zip(path, files) if kind == "zip" else save_tar(path, list(files.items()))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) if kind == "tar" and cut < 0 else len(content)
    path.write_bytes(content[: end + cut if cut < 0 else cut])
    with pytest.raises(DataError, match=rf"cut\.{kind}: cannot be read as a {kind}"):
        Archive(path)


def test_a_tar_whose_headers_are_damaged_is_not_taken_for_its_beginning(tmp_path):
    path = save_tar(tmp_path / "a.tar", [("a.png", PICTURE), ("b.png", PICTURE)])
    content = bytearray(path.read_bytes())
    content[content.index(b"b.png") + 1] = 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: cannot be read as a tar \(no header at byte \d+\)"):
        Archive(path)


def test_a_packed_tar_is_told_apart(tmp_path):
    save_tar(tmp_path / "plain.tar", [("a.png", PICTURE)])
    path = tmp_path / "packed.tar"
    path.write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    with pytest.raises(DataError, match=r"one that is compressed \(\.tar\.gz\) cannot be read in any order: gunzip it"):
        Archive(path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_changes_is_noticed(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    save = save_zip if kind == "zip" else lambda place, files: save_tar(place, list(files.items()))
    save(path, {"a.png": PICTURE, "b.png": PICTURE})
    archive = Archive(path)
    archive.find("t:1", "a.png")
    save(path, {"a.png": PICTURE, "b.png": PICTURE + b"x"})
    with pytest.raises(DataError, match=rf"a\.{kind} has changed since it was opened"):
        archive.find("t:1", "b.png")


def test_pictures_of_archives_in_worker_processes(tmp_path, processor):
    names = [f"{number}.png" for number in range(12)]
    save_zip(tmp_path / "images.zip", {name: encoded(make_picture(n), "PNG") for n, name in enumerate(names)})
    path = write_jsonl(tmp_path / "t.jsonl", [{"image": name, "conversations": TURNS} for name in names])
    samples = read_samples(path, ReadOptions(images_path=str(tmp_path / "images.zip")))
    data = ConversationDataset(samples, processor, 64)
    wanted = collate_training([data[number] for number in range(12)])["pixel_values"]
    for sent in (data, pickle.loads(pickle.dumps(data))):  # as a process that is forked gets it, or one that is not
        (batch,) = DataLoader(sent, 12, num_workers=1, collate_fn=collate_training)
        assert (batch["pixel_values"] == wanted).all()


def test_questions_about_one_picture_read_it_once(tmp_path, monkeypatch):
    archive = Archive(save_zip(tmp_path / "a.zip", {"a.png": PICTURE, "b.png": PICTURE}))
    reads, read = [], archives.read_member
    monkeypatch.setattr(archives, "read_member", lambda *args: (reads.append(1), read(*args))[1])
    for name in ("a.png", "./a.png", "a.png", "b.png", "a.png"):
        assert archive.find("t:1", name) == PICTURE
    assert len(reads) == 3


# ---- WebDataset's


def captioned(records: int) -> list[tuple[str, bytes]]:
    """Members of so many records."""
    pictures = [(f"{number:03}.png", encoded(make_picture(number), "PNG")) for number in range(records)]
    return [member for name, content in pictures for member in ((name, content), (f"{name[:3]}.txt", b"a cat"))]


def test_hostile_members_of_a_record_refuse_that_record(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for key in ("a", "b", "c", "d", "e"):
            if key == "b":
                add(tar, "b.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            elif key == "c":
                add(tar, "../c.png")
            else:
                add(tar, f"{key}.png")
            add(tar, "../c.txt" if key == "c" else f"{key}.txt", b"a cat")
            if key == "d":
                add(tar, "d.txt", b"a dog")
        add(tar, "a.png")  # once more, far from the first
        add(tar, "a.txt", b"another")
        add(tar, "f.txt", b"\xff")
        add(tar, "g.json", b'{"text": "x", "text": "y"}')
        add(tar, "h.json", b"[]")
    reader = read_samples(tmp_path / "shard.tar")
    found = {}
    for number in range(len(reader)):
        try:
            reader[number].open_pictures()
        except BadSample as error:
            found[str(reader.where(number)).rpartition(":")[2]] = found.get("a", "") or str(error)
    reasons = {"b": "a link", "../c": "leads out", "d": "two members", "a": "another record before it has this name",
               "f": "its .txt cannot be read", "g": "stands twice", "h": "must be an object"}  # fmt: skip
    assert found.keys() == reasons.keys()
    with pytest.raises(BadSample, match=r"shard\.tar:b: .*a link"):
        reader[1]
    assert reader[0].messages[1]["content"] == "a cat" and reader[4].pictures == (PICTURE,)


def test_one_shard_that_is_cut_short_costs_its_rest(tmp_path, processor):
    files = [
        (f"{number:03}.{kind}", PICTURE if kind == "png" else b"a cat")
        for number in range(9)
        for kind in ("png", "txt")
    ]
    for shard in range(3):
        save_tar(tmp_path / f"{shard}.tar", files)
    content = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(content[: content.index(b"005.png") + 600])
    data = ConversationDataset(read_samples(tmp_path), processor, 64, lenient())
    assert data.report.conversations == 9 + 5 + 9
    (bad,) = data.report.bad
    assert bad.where.startswith(f"{tmp_path / '1.tar'}:") and "cannot be read as a tar" in bad.reason
    with pytest.raises(DataError, match=r"3\.tar does not exist, one of 4 files"):
        read_samples(tmp_path / "{0..3}.tar")


def test_workers_open_shards_for_themselves(tmp_path, processor):
    files = [
        (f"{n}.{kind}", encoded(make_picture(n), "PNG") if kind == "png" else b"a cat")
        for n in range(8)
        for kind in ("png", "txt")
    ]
    data = ConversationDataset(read_samples(save_tar(tmp_path / "a.tar", files)), processor, 64)
    wanted = collate_training([data[number] for number in range(8)])["pixel_values"]
    batches = list(DataLoader(data, 4, num_workers=2, collate_fn=collate_training))
    assert (batches[0]["pixel_values"] == wanted[:4]).all() and (batches[1]["pixel_values"] == wanted[4:]).all()
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_cut_behind_a_member_that_nobody_reads_is_told_too(tmp_path):
    path = save_tar(tmp_path / "a.tar", [*captioned(2), ("002.cls", b"7" * 3000)])
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"002.cls") + 600])
    reader = read_samples(path)
    assert [reader[number].messages[1]["content"] for number in (0, 1)] == ["a cat", "a cat"]
    with pytest.raises(BadSample, match=r"a\.tar:002: .*cannot be read as a tar"):
        reader[2]
