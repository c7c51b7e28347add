"""Stages whose pictures are cut: resumed, on two ranks, with cached features, and refused where weights disagree."""

import dataclasses
import json

import pytest

from helpers.data import make_picture
from helpers.faults import outcome, run_ranks
from helpers.runs import assert_bit_equal, refusal, run_until, tiny, weights_of
from model.weights import load_model, read_sizes
from trainer.stage import run_stage
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def cut_folder(data_folder):
    """The data folder, half of whose pictures are too large for one view."""
    for number, path in enumerate(sorted((data_folder / "images").iterdir())):
        if number % 2:
            make_picture(number, 60).crop((0, 0, 60, 40 + number)).save(path)
    return data_folder


def cutting(folder, tower, **changes):
    return tiny(SFT_VLM, folder, tower, **{"max_seq_len": 128, "tiles": 4, "save_interval": 1, **changes})


def test_a_resumed_run_equals_an_unbroken_one(cut_folder, tower_folder, monkeypatch):
    unbroken = cutting(cut_folder, tower_folder, save_dir=str(cut_folder / "unbroken"))
    run_stage(unbroken)
    assert read_sizes(unbroken.weight_path)["tiles"] == 4
    broken = cutting(cut_folder, tower_folder)
    run_until(broken, 2, monkeypatch)
    run_stage(dataclasses.replace(broken, from_resume=1))
    assert outcome(broken) == outcome(unbroken)


def test_two_ranks_learn_what_one_learns(cut_folder, tower_folder):
    one = cutting(cut_folder, tower_folder, save_dir=str(cut_folder / "one"))
    run_stage(one)
    two = cutting(cut_folder, tower_folder, save_dir=str(cut_folder / "two"), batch_size=4)
    assert run_ranks(two, 2) == [0, 0]
    found, wanted = weights_of(two), weights_of(one)
    for name, value in wanted.items():
        assert found[name].sub(value).abs().max() < 2e-5, name


def test_cached_views_teach_what_decoded_ones_do(cut_folder, tower_folder):
    runs = {}
    for kind in ("none", "pixels", "float16"):
        config = cutting(cut_folder, tower_folder, save_dir=str(cut_folder / kind), cache_features=kind)
        run_stage(config)
        runs[kind] = weights_of(config)
    assert_bit_equal(runs["pixels"], runs["none"])
    for name, value in runs["none"].items():
        assert runs["float16"][name].sub(value).abs().max() < 1e-2, name


def test_tiles_are_those_of_the_weights(cut_folder, tower_folder):
    """A stage goes on with what it starts from; weights that know none may learn them; others are refused."""
    plain = tiny(PRETRAIN_VLM, cut_folder, tower_folder)
    run_stage(plain)
    starts = {"from_weight": str(plain.weight_path)}
    first = cutting(cut_folder, tower_folder, **starts)
    run_stage(first)
    assert load_model(first.weight_path).config.tiles == 4
    starts["from_weight"] = str(first.weight_path)
    second = cutting(cut_folder, tower_folder, **{**starts, "tiles": 0, "save_dir": str(cut_folder / "second")})
    run_stage(second)
    assert load_model(second.weight_path).config.tiles == 4
    other = cutting(cut_folder, tower_folder, **{**starts, "tiles": 6, "save_dir": str(cut_folder / "third")})
    refusal(other, "--tiles 6 is not what", "was trained with, 4: leave --tiles out")


def test_a_run_goes_on_with_its_own_tiles_only(cut_folder, tower_folder, monkeypatch):
    config = cutting(cut_folder, tower_folder)
    run_until(config, 2, monkeypatch)
    with pytest.raises(SystemExit, match="--tiles: expected 4, found 2"):
        run_stage(dataclasses.replace(config, tiles=2, from_resume=1))


def test_without_tiles_checkpoints_say_nothing_of_them(cut_folder, tower_folder):
    config = tiny(PRETRAIN_VLM, cut_folder, tower_folder)
    run_stage(config)
    (manifest,) = (config.run_dir / "checkpoints").glob("*/manifest.json")
    assert "--tiles" not in json.loads(manifest.read_text())["fingerprints"]
