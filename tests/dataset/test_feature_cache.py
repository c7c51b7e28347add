"""Cached features are the tower's own outputs, computed once, whoever computes them and however often it is stopped."""

import dataclasses
import json
import pickle
import shutil
import tracemalloc
from collections import namedtuple

import pytest
import torch

from dataset import feature_cache
from dataset.feature_cache import cache_features
from dataset.readers.opening import read_samples
from dataset.samples import DataError
from dataset.vlm_dataset import ConversationDataset
from helpers.data import make_picture, turns, write_parquet
from helpers.models import Encoder
from helpers.runs import assert_bit_equal, losses, tiny, weights_of
from model.processing import collate_training
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def data(data_folder, processor) -> ConversationDataset:
    return ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, 400)


def test_features_are_what_the_tower_gives(data, make_vlm, tmp_path):
    model = make_vlm()
    wanted = [[model.encode_pictures(pixels[None])[0] for pixels in data[row][1]] for row in range(len(data))]
    batch = collate_training([data[row] for row in range(6)])
    online = model(**batch).loss
    cache_features(data, model.encode_pictures, "tower", "float16", tmp_path / "cache")
    for row, patches in enumerate(wanted):
        found = data[row][1]
        assert len(found) == len(patches)
        for one, other in zip(found, patches, strict=True):
            assert torch.equal(one, other.half())
    cached = collate_training([data[row] for row in range(6)])
    assert "pixel_values" not in cached
    torch.testing.assert_close(model(**cached).loss, online, rtol=0, atol=1e-3)
    sent = pickle.loads(pickle.dumps(data))  # to a worker
    assert torch.equal(sent[0][1][0], data[0][1][0])


def test_eight_bits_keep_small_channels_beside_large_ones(data, tmp_path):
    size = torch.tensor([1e-3, 1.0, 300.0] * 4)  # of each channel

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.tanh(pixels.float().flatten(1)[:, :48].view(-1, 4, 12) / 128 - 1) * size

    wanted = [encode(torch.stack(data.pixels(row))) for row in (0, 1)]
    cache_features(data, encode, "tower", "int8", tmp_path / "cache")
    for row, patches in zip((0, 1), wanted, strict=True):
        found = torch.stack(data[row][1]).float()
        assert found.shape == patches.shape
        assert float(((found - patches).abs() / size).max()) < 1 / 127


def test_a_channel_that_is_silent_in_the_first_pictures_stays_silent_in_eight_bits(data, tmp_path):
    cache_features(data, lambda pixels: torch.zeros(len(pixels), 4, 12), "tower", "int8", tmp_path / "cache")
    assert data.features.scales.min() > 0 and not torch.stack(data[0][1]).any()


def test_what_is_there_is_not_computed_again(data, make_vlm, tmp_path, monkeypatch):
    """A build that is killed goes on where it was; two ranks fill one cache; a second run only reads."""
    encode, folder = Encoder(make_vlm()), tmp_path / "cache"
    monkeypatch.setattr(feature_cache, "CHUNK", 2)

    def dies(pixels: torch.Tensor) -> torch.Tensor:
        if encode.seen > 7:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        cache_features(data, dies, "tower", "float16", folder)
    done = encode.seen - 1  # one picture tells the width
    encode.seen = 0
    cache_features(data, encode, "tower", "float16", folder, rank=1, world_size=2)
    assert 0 < encode.seen - 1 < 12
    cache_features(data, encode, "tower", "float16", folder, rank=0, world_size=2)
    assert encode.seen - 2 == 24 - done
    assert torch.equal(data[23 - 1][1][0], encode.model.encode_pictures(data.pixels(22)[0][None])[0].half())
    encode.seen = 0
    cache_features(data, encode, "tower", "float16", folder)
    assert encode.seen == 1


def test_another_tower_picture_or_format_is_another_cache(data_folder, processor, make_vlm, tmp_path):
    encode, folder = Encoder(make_vlm()), tmp_path / "cache"

    def build(tower: str = "tower", kind: str = "float16") -> int:
        nonlocal data
        data = ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, 400)
        cache_features(data, encode, tower, kind, folder)
        return len(list(folder.iterdir()))

    data = None
    assert [build(), build(), build("other"), build(kind="int8")] == [1, 1, 2, 3]
    assert [build(kind="pixels"), build("other", "pixels")] == [4, 4]  # pixels know no tower
    make_picture(999).save(data_folder / "images" / "0_0.png")
    assert build() == 5
    assert torch.equal(data[0][1][0], encode.model.encode_pictures(data.pixels(0)[0][None])[0].half())


@pytest.mark.parametrize(("kind", "cure"), [("float16", "make room, choose int8, or"), ("pixels", "make room, or")])
def test_a_disk_too_small_is_refused_before_anything_is_written(kind, cure, data, make_vlm, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2000, 1000, 1000))
    with pytest.raises(DataError, match=rf"--cache_features {kind} needs 0.00 GB .* 24 pictures .* {cure}"):
        cache_features(data, make_vlm().encode_pictures, "tower", kind, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_pictures_that_lines_share_are_encoded_once(data_folder, processor, make_vlm, tmp_path):
    samples = list(read_samples(data_folder / "train.jsonl"))
    data = ConversationDataset([samples[0], samples[3], samples[0], samples[2]], processor, 400)
    encode = Encoder(make_vlm())
    cache_features(data, encode, "tower", "float16", tmp_path / "cache")
    assert encode.seen == 1 + 2
    assert torch.equal(data[0][1][0], data[2][1][0]) and data[3][1] == []


@pytest.mark.parametrize(("kind", "workers"), [("float16", 0), ("int8", 2)])
def test_a_stage_learns_the_same_from_its_cache(kind, workers, data_folder, tower_folder):
    online = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "online"))
    cached = dataclasses.replace(
        online, cache_features=kind, num_workers=workers, save_dir=str(data_folder / "cached"),
    )  # fmt: skip
    for config in (online, cached):
        run_stage(config)
    assert losses(cached) == pytest.approx(losses(online), rel=5e-3)
    assert len(list((data_folder / "cached" / "features").iterdir())) == 1


def no_tower(*_):
    raise AssertionError("pixels need no tower")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_learns_the_same_to_the_bit_from_kept_pixels(workers, data_folder, tower_folder):
    online = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "online"), epochs=2)
    kept = dataclasses.replace(
        online, cache_features="pixels", num_workers=workers, save_dir=str(data_folder / "kept")
    )  # fmt: skip
    run_stage(online)
    run_stage(kept)
    assert losses(kept) == losses(online)
    assert_bit_equal(weights_of(kept), weights_of(online))


def test_kept_pixels_are_decoded_once(data, data_folder, tmp_path):
    wanted = [data[row][1] for row in range(len(data))]
    cache_features(data, no_tower, "tower", "pixels", tmp_path / "cache")
    shutil.rmtree(data_folder / "images")
    for row, pictures in enumerate(wanted):
        found = data[row][1]
        assert len(found) == len(pictures) and all(map(torch.equal, found, pictures))
        assert all(picture.dtype == torch.uint8 for picture in found)
    batch = collate_training([data[row] for row in range(6)])
    assert "pixel_values" in batch and "patch_features" not in batch
    assert torch.equal(pickle.loads(pickle.dumps(data))[0][1][0], wanted[0][0])


def test_pictures_in_a_parquet_are_not_held_in_memory(tmp_path, processor, make_vlm):
    """Of a picture's bytes only a hash is kept."""
    pictures = []
    for number in range(40):
        make_picture(number, 256).save(tmp_path / "picture.png")
        pictures.append((tmp_path / "picture.png").read_bytes())
    texts = [json.dumps(turns(1, "a cat " * (number + 1))) for number in range(80)]
    path = write_parquet(tmp_path / "train.parquet", texts, pictures * 2)
    data = ConversationDataset(read_samples(path), processor, 400)
    data[0]  # what is loaded once is no growth
    tracemalloc.start()
    cache_features(data, make_vlm().encode_pictures, "tower", "float16", tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(map(len, pictures)) / 4
    assert data.features.shape[0] == 40 and all(map(torch.equal, data[3][1], data[43][1]))
