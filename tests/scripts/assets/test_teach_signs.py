"""A tower that goes on to read signs: what it is shown, and what it must not forget."""

import json
from random import Random

import numpy as np
import pytest
import torch

from dataset import emoji_signs as signs
from model.files import ROOT, SHIPPED_TOWER
from model.tower_folder import read_tower
from model.vision_encoder import normalize_pixels
from scripts.assets import teach_signs
from scripts.assets.teach_signs import COLOURS, COVERED, TEXTS, CloseUps, close_up, patches_of

PATCH, GRID = 16, 14


def test_patches_of_a_close_up_say_what_their_board_says():
    """Slowly: each patch's share of board, pixel by pixel."""
    for index in range(6):
        scene = signs.sample_sign_scene("1", "train", index, 128)
        picture = signs.render(scene)
        for sign in scene.signs:
            rng = Random(f"{index}:{sign.text}")
            one = close_up(picture, scene, sign, rng)
            pixels = one["pixels"].numpy().transpose(1, 2, 0)
            left, top = one["left"], one["top"]
            assert np.array_equal(pixels, np.asarray(picture.crop((left, top, left + 224, top + 224))))
            for number, label in enumerate(one["text"].tolist()):
                y, x = top + number // GRID * PATCH, left + number % GRID * PATCH
                shares = {other: overlap((x, y, x + PATCH, y + PATCH), other.box) for other in scene.signs}
                covering = [(other.text, other.colour) for other, share in shares.items() if share > COVERED]
                said = [(TEXTS[label], COLOURS[one["colour"][number]])] if label >= 0 else []
                assert said == covering and (one["colour"][number] >= 0) == (label >= 0)
            assert (one["text"] == TEXTS.index(sign.text)).sum() >= 12  # a part of the board is there


def overlap(patch: tuple, box: tuple) -> float:
    width = min(patch[2], box[2]) - max(patch[0], box[0])
    height = min(patch[3], box[3]) - max(patch[1], box[1])
    return max(width, 0) * max(height, 0) / PATCH**2


def test_close_ups_are_as_many_as_asked_and_the_same_each_time():
    alone = [one["text"] for one in CloseUps("1", "train", 9)]
    assert len(alone) == 9
    again = [one["text"] for one in CloseUps("1", "train", 9)]
    assert all(map(torch.equal, alone, again))


def test_a_tower_goes_on_and_is_read_as_any_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that what the run sets is undone
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    teach_signs.main(["--output", str(tmp_path / "tower"), "--pictures", "8", "--batch_size", "4", "--held_out", "4"])
    (entry,) = json.loads((tmp_path / "tower" / "training.json").read_text())["history"]
    assert (
        entry["pictures"] == 8
        and 0 <= entry["boards_read"] <= 1
        and 0 <= entry["colours"] <= 1
        and 0 <= entry["moved"] < 1
    )
    assert "step 2/2" in capsys.readouterr().out
    tower, _ = read_tower(tmp_path / "tower")
    before = read_tower(ROOT / SHIPPED_TOWER)[0].state_dict()
    assert all((value != before[name]).any() for name, value in tower.state_dict().items() if "mlp.fc1.w" in name)
    pixels = torch.randint(0, 255, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        wanted = tower.float()(pixel_values=normalize_pixels(pixels)).last_hidden_state[:, 1:]
        found = patches_of(tower, pixels, torch.float32)
        kept = torch.tensor([[3, 90, 195], [0, 1, 2]])
        assert patches_of(tower, pixels, torch.float32, kept).shape == (2, 3, wanted.shape[-1])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_output_is_not_the_tower_that_ships(tmp_path):
    with pytest.raises(SystemExit):
        teach_signs.main(["--pictures", "8"])
