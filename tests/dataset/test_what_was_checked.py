"""What was checked is what is used, whatever becomes of the files; pictures are known by their content."""

import dataclasses
import json
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

from dataset import feature_cache, vlm_dataset
from dataset.feature_cache import cache_features
from dataset.options import ReadOptions
from dataset.quarantine import Quarantine
from dataset.readers.opening import read_samples
from dataset.samples import BadSample, DataError
from dataset.step_batch import StepBatches
from dataset.vlm_dataset import ConversationDataset
from helpers.data import make_picture, turns, write_jsonl
from helpers.models import Encoder
from helpers.runs import losses, tiny
from model import processing
from model.messages import UserError
from model.pictures import TooManyPixels, open_picture
from scripts.score import read_questions
from trainer.checkpoint.fingerprint import data_fingerprint
from trainer.config import parse_config
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def path(data_folder) -> Path:
    return data_folder / "train.jsonl"


@pytest.fixture
def start(path, processor, tmp_path, monkeypatch):
    """Open the data as a run does, with its tokens kept in tmp_path/tokens."""
    monkeypatch.setattr(vlm_dataset, "WORTH_KEEPING", 1)

    def open_data(said: list | None = None, max_share: float = 0.5) -> ConversationDataset:
        quarantine = Quarantine(None, strict=False, max_share=max_share)
        say = (said if said is not None else []).append
        return ConversationDataset(read_samples(path), processor, 400, quarantine, tmp_path / "tokens", say)

    return open_data


def pictures_of(data: ConversationDataset) -> list[list[torch.Tensor]]:
    return [pictures for _, pictures, _ in (data[row] for row in range(len(data)))]


def assert_same(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))


# ---- the data file


def test_a_data_file_replaced_in_training_changes_nothing(start, path):
    data = start()
    wanted, mark = pictures_of(data), data_fingerprint(Subset(data, range(len(data))))
    content = path.read_text()
    path.write_text(content.replace('"0_0.png"', '"@"').replace('"3_0.png"', '"0_0.png"').replace('"@"', '"3_0.png"'))
    assert_same(pictures_of(data), wanted)
    assert data_fingerprint(Subset(data, range(len(data)))) == mark
    path.unlink()
    assert_same(pictures_of(data), wanted)
    assert data.where(3) == f"{path}:4"


@pytest.mark.parametrize("change", ["written to", "replaced"])
def test_a_data_file_that_changes_while_it_is_read_is_refused(change, path, processor, tmp_path):
    samples = read_samples(path)
    if change == "written to":
        with path.open("a") as file:
            file.write("{}\n")
    else:
        facts = path.stat()
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.utime(tmp_path / "other", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        (tmp_path / "other").replace(path)
    for use in (lambda: samples[0], samples.identity, lambda: ConversationDataset(samples, processor, 400)):
        with pytest.raises(DataError, match="train.jsonl has changed since it was opened: start again") as error:
            use()
        assert not isinstance(error.value, BadSample)


# ---- what the disk or the system does not give


def test_rights_that_are_mended_are_noticed(start, data_folder, monkeypatch):
    """As root may read everything, the denial is played."""
    opened, said = Image.open, []

    def deny(source: object, **kinds: object) -> Image.Image:
        if str(source).endswith("/3_0.png"):
            raise PermissionError(13, "Permission denied", str(source))
        return opened(source, **kinds)

    with monkeypatch.context() as patched:
        patched.setattr(processing.Image, "open", deny)
        (bad,) = start().report.bad
        assert "Permission denied), which is no fault of the picture: see to the rights" in bad.reason
        assert start(said).report.bad == [bad] and said[0].startswith("rendered at an earlier start")
    said.clear()
    assert start(said).report.bad == [] and "train.jsonl:4 has changed): rendering them again" in said[0]


def test_a_folder_that_may_not_be_entered_is_told_as_that(path, monkeypatch):
    samples = read_samples(path)

    def deny(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", deny)
    with pytest.raises(BadSample, match=r"'0_0.png': the file could not be read \(Permission denied\)"):
        _ = samples[0]


# ---- cached features


def test_two_folders_of_like_named_pictures_share_nothing(processor, make_vlm, tmp_path):
    encode, found = Encoder(make_vlm()), []
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder / "images").mkdir(parents=True)
        make_picture(seed).save(tmp_path / folder / "images" / "0.bmp")
        os.utime(tmp_path / folder / "images" / "0.bmp", ns=(10**18, 10**18))
        lines = write_jsonl(tmp_path / folder / "train.jsonl", [{"image": "0.bmp", "conversations": turns(1)}])
        data = ConversationDataset(read_samples(lines), processor, 400)
        cache_features(data, encode, "tower", "float16", tmp_path / "cache")
        found.append((data[0][1][0], encode.model.encode_pictures(data.pixels(0)[0][None])[0].half()))
    assert all(torch.equal(*pair) for pair in found) and not torch.equal(found[0][0], found[1][0])


def test_pictures_are_known_by_content_and_read_once(data_folder, path, processor, make_vlm, tmp_path, monkeypatch):
    encode = Encoder(make_vlm())

    def build() -> int:
        encode.seen = 0
        cache_features(ConversationDataset(read_samples(path), processor, 400), encode, "t", "float16", tmp_path / "c")
        return encode.seen

    assert build() == 1 + 24
    with monkeypatch.context() as patched:
        patched.setattr(feature_cache.hashlib, "file_digest", None)  # nothing is read again
        assert build() == 1
    for picture in (data_folder / "images").iterdir():
        os.utime(picture, ns=(10**18, 10**18))
    assert build() == 1  # touched, and the same
    for kept in (tmp_path / "c").glob("*/*.hashes"):
        kept.write_bytes(kept.read_bytes()[:-1])  # damaged: the pictures are read again
    assert build() == 1
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_picture_that_changes_before_it_is_encoded_is_refused(
    when, data_folder, path, processor, make_vlm, tmp_path, monkeypatch
):
    data = ConversationDataset(read_samples(path), processor, 400)
    picture, encode = data_folder / "images" / "0_0.png", make_vlm().encode_pictures
    if when == "after":  # it was hashed
        hashes = feature_cache.Pictures._hash
        monkeypatch.setattr(
            feature_cache.Pictures, "_hash", lambda *a: (hashes(*a), make_picture(999).save(picture))[0]
        )
    else:
        make_picture(999).save(picture)
        os.utime(picture, ns=(10**18, 10**18))
    with pytest.raises(DataError, match=r"train.jsonl:1: .*0_0.png has changed since it was checked: start again"):
        cache_features(data, encode, "tower", "float16", tmp_path / "cache")


# ---- processes that are not forked


def test_a_reading_process_gets_paths_and_no_columns(start, path, data_folder):
    line = json.loads(path.read_text().splitlines()[0])
    write_jsonl(path, [{**line, "conversations": turns(1, f"a cat {number} times" * 20)} for number in range(800)])
    start()
    for data in (start(), pickle.loads(pickle.dumps(start()))):
        sent = pickle.dumps(data)
        assert len(sent) - len(pickle.dumps(data.processor)) < 5_000
        assert data.ids.nbytes > 50_000
        received = pickle.loads(sent)
        assert np.array_equal(received.ids, data.ids) and not received.ids.flags.writeable
        assert received[799][0] == data[799][0] and torch.equal(received[799][1][0], data[799][1][0])
        assert received.where(799) == f"{path}:800"
        assert received.samples[7].messages == data.samples[7].messages  # it finds the lines again where it must


def test_questions_met_are_not_sent(processor):
    size = len(pickle.dumps(processor))
    for number in range(1000):
        processor.encode(f"What is number {number}?")
    assert len(pickle.dumps(processor)) <= size + 100


def test_kept_tokens_that_others_made_anew_are_sent_as_they_were(start, data_folder):
    start()
    data = start()
    make_picture(999).save(data_folder / "images" / "1_0.png")
    (data_folder / "images" / "0_0.png").unlink()
    assert len(start()) == len(data) - 1  # another run has written the file again
    received = pickle.loads(pickle.dumps(data))
    assert np.array_equal(received.ids, data.ids) and len(received) == len(data)


def test_pickled_tokens_are_never_those_of_another_file(start, data_folder):
    start()
    sent = pickle.dumps(start())
    (data_folder / "images" / "0_0.png").unlink()
    start()
    with pytest.raises(DataError, match="has been made anew by another run: start this one again"):
        pickle.loads(sent)


def test_spawned_processes_read_the_same(start, tmp_path):
    start()
    data, kept = start(), start()
    cache_features(kept, None, "", "pixels", tmp_path / "cache")
    numbers = [[[0, 1, 2], [5]], [[7, 4]], [[24, 25, 26], [29]]]
    load = partial(DataLoader, StepBatches(ConcatDataset([data, kept])), batch_size=None, sampler=numbers)
    wanted = list(load(collate_fn=_same))
    found = list(load(collate_fn=_same, num_workers=1, multiprocessing_context="spawn"))
    for one, other in zip(found, wanted, strict=True):
        assert one.counts == other.counts and one.rejected == other.rejected
        for batch, like in zip(one.micro_batches, other.micro_batches, strict=True):
            assert batch.keys() == like.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(like[name])) for name in like)


def _same(share):
    return share


# ---- links and large photographs


@pytest.fixture
def linked(data_folder) -> Path:
    """As in the hub's cache: names are links to files elsewhere."""
    (data_folder / "blobs").mkdir()
    for picture in list((data_folder / "images").iterdir()):
        blob = data_folder / "blobs" / picture.stem
        picture.rename(blob)
        picture.symlink_to(blob)
    return data_folder / "train.jsonl"


def test_links_that_lead_out_are_followed_where_it_is_asked(linked, data_folder, processor):
    with pytest.raises(BadSample, match=r"'0_0.png' lies outside .* or --follow_links 1 where links may lead out"):
        _ = read_samples(linked)[0]
    samples = read_samples(linked, options=ReadOptions(follow_links=True))
    data = ConversationDataset(samples, processor, 400)
    assert torch.equal(data[0][1][0], processor.pixels(make_picture(0)))
    for name in ("../blobs/0_0", str(data_folder / "blobs" / "0_0"), "x/../0_0.png"):
        path = write_jsonl(data_folder / "other.jsonl", [{"image": name, "conversations": turns(1)}])
        with pytest.raises(BadSample, match="lies outside") as error:
            _ = read_samples(path, options=ReadOptions(follow_links=True))[0]
        assert "follow_links" not in str(error.value)
    (data_folder / "images" / "pipe.png").symlink_to("/dev/zero")
    path = write_jsonl(data_folder / "other.jsonl", [{"image": "pipe.png", "conversations": turns(1)}])
    with pytest.raises(BadSample, match="no regular file"):
        _ = read_samples(path, options=ReadOptions(follow_links=True))[0]


def test_limits_have_a_part_in_what_is_kept(path):
    limits = (ReadOptions(), ReadOptions(follow_links=True), ReadOptions(max_megapixels=50))
    assert len({json.dumps(read_samples(path, limit).identity()) for limit in limits}) == 3


def test_a_run_follows_links(linked, data_folder, tower_folder):
    config = tiny(SFT_VLM, data_folder, tower_folder, follow_links=1)
    run_stage(config)
    assert len(losses(config)) > 0
    with pytest.raises(SystemExit, match="--follow_links 1"):
        run_stage(dataclasses.replace(config, follow_links=0, name="other"))


@pytest.fixture
def photograph(data_folder) -> Path:
    """48 megapixels, as a telephone takes them: a wide gradient, so that a wrong scale would show."""
    row = np.linspace(0, 255, 8064).astype(np.uint8)
    photograph = Image.fromarray(np.broadcast_to(row, (6048, 8064)).copy()).convert("RGB")
    photograph.save(data_folder / "images" / "large.jpg", quality=60)
    return write_jsonl(data_folder / "large.jsonl", [{"image": "large.jpg", "conversations": turns(1)}])


def test_large_photographs_are_read_where_it_is_asked(photograph, data_folder, processor):
    with pytest.raises(
        BadSample, match=r"8064 x 6048 pixels, more than 25,000,000: scale .* or raise --max_megapixels"
    ):
        read_samples(photograph)[0].open_pictures()
    limits = ReadOptions(max_megapixels=49)
    (picture,) = read_samples(photograph, limits)[0].open_pictures()
    assert picture.size == (2016, 1512)  # decoded at a quarter: 9 MB instead of 146
    pixels = processor.pixels(picture)
    assert abs(int(pixels[0, 16, 4]) - 36) <= 2 and abs(int(pixels[0, 16, 28]) - 227) <= 2
    data = ConversationDataset(read_samples(photograph, limits), processor, 400)
    assert torch.equal(data[0][1][0], pixels) and data[0].rejected == ()
    assert read_questions(photograph, limits)[0].sample.open_pictures()[0].size == picture.size
    with pytest.raises(TooManyPixels):
        open_picture(data_folder / "images" / "large.jpg", decode=False)


@pytest.mark.parametrize("number", [0, 90, -1])
def test_a_limit_that_cannot_be_is_refused_at_once(number, capsys):
    with pytest.raises(UserError, match=rf"--max_megapixels {number} must lie within 1 and 89"):
        ReadOptions(max_megapixels=number)
    with pytest.raises(SystemExit):
        parse_config(SFT_VLM, ["--max_megapixels", str(number)])
    assert f"--max_megapixels {number} must lie within 1 and 89" in capsys.readouterr().err
