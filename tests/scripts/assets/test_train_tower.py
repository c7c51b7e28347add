"""The small tower's training, in small: which matrices Muon moves, what is saved, and going on from it."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from model.messages import UserError
from model.tower_folder import read_tower
from scripts.assets import train_tower
from scripts.assets.train_tower import PatchTextModel, build_optimizer

SMALL = ["--hidden_size", "64", "--num_hidden_layers", "1", "--batch_size", "4", "--num_workers", "0"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train("--pictures", 8, ...) -> the folder, and which training scenes were drawn."""
    drawn, draw = [], train_tower.Scenes.__getitem__

    def watched(scenes: train_tower.Scenes, index: int) -> dict:
        if scenes.split == "train":
            drawn.append(index)
        return draw(scenes, index)

    monkeypatch.setattr(train_tower.Scenes, "__getitem__", watched)
    monkeypatch.setattr(train_tower, "evaluate", partial(train_tower.evaluate, count=6))
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that what the run sets is undone
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")

    def run(name: str, *flags: object) -> tuple[Path, list[int]]:
        drawn.clear()
        train_tower.main(["--output", str(tmp_path / name), *SMALL, *map(str, flags)])
        return tmp_path / name, list(drawn)

    return run


def test_muon_moves_the_matrices_of_the_layers_and_nothing_else(tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = PatchTextModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=16), tokenizer, width=32)
    groups = build_optimizer(model, 1e-3, torch.float32).param_groups
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in listed}) == len(listed) == len(list(model.parameters()))
    moved = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    names = {name.removeprefix("tower.") for name, parameter in model.named_parameters() if id(parameter) in moved}
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"encoder.layers.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in matrices}
    for group in groups:
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_a_run_leaves_a_tower_and_another_goes_on_from_it(train):
    first, drawn = train("first", "--pictures", 8)
    assert drawn == list(range(8)) and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"
    tower, _ = read_tower(first)
    assert tower.config.hidden_size == 64 and len(tower.encoder.layers) == 1
    record = json.loads((first / "training.json").read_text())
    assert record["arguments"]["pictures"] == "8"
    [entry] = record["history"]
    assert entry["pictures"] == 8 and {"patch_en", "patch_zh", "place", "count", "ground"} <= set(entry)
    second, drawn = train("second", "--pictures", 16, "--go_on_from", first)
    assert drawn == list(range(8, 16))  # none twice
    history = json.loads((second / "training.json").read_text())["history"]
    assert history[0] == entry and [line["pictures"] for line in history] == [8, 16]
    again, _ = read_tower(second)  # which has not learnt yet: the phrases come first
    before = tower.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_there_must_be_pictures_left_to_go_on_with(train):
    first, _ = train("first", "--pictures", 4)
    with pytest.raises(UserError, match="first has seen 4 pictures: --pictures must be more"):
        train("second", "--pictures", 4, "--go_on_from", first)


def test_training_changes_the_tower(train):
    """Two runs of one seed agree before the first step, and a longer one has moved on from there."""
    folders = [train(name, "--pictures", count, "--save_interval", 1)[0] for name, count in (("one", 4), ("two", 8))]
    weights = [read_tower(folder)[0].encoder.layers[0].mlp.fc1.weight for folder in folders]
    assert not torch.equal(*weights)
    history = json.loads((folders[1] / "training.json").read_text())["history"]
    assert [entry["pictures"] for entry in history] == [4, 8]
