"""Reading a CLIP tower: the vision half of a whole CLIP, or one alone, never one with holes."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from helpers.models import IMAGE_SIZE, SIZES, VISION_SIZES
from model.files import ROOT, SHIPPED_TOWER
from model.tokenizer_files import load_tokenizer
from model.tower_folder import read_tower
from model.vision_encoder import KINDS
from model.weights import build_vlm
from scripts.assets import train_tokenizer, train_tower


def whole_clip(folder: Path) -> CLIPModel:
    """A tiny text and vision CLIP, saved in the folder as openai's is."""
    torch.manual_seed(11)
    text = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_SIZES, projection_dim=8)).eval()
    model.save_pretrained(folder)
    return model


def features(tower, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tower(pixels).last_hidden_state


PIXELS = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_tower_is_the_vision_half_of_a_whole_clip(tmp_path, file):
    clip = whole_clip(tmp_path)
    if file == "pytorch_model.bin":
        torch.save(clip.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    tower, sha256 = read_tower(tmp_path)
    assert torch.equal(features(tower, PIXELS), features(clip.vision_model, PIXELS))
    assert features(tower, PIXELS).std() > 0.1
    assert sha256 == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    model = build_vlm(SIZES, tmp_path)
    assert torch.equal(features(model.vision_encoder, PIXELS), features(clip.vision_model, PIXELS))


def test_tower_is_frozen_asleep_and_in_fp32(tmp_path, tower_folder):
    tower, _ = read_tower(tower_folder)
    half = tmp_path / "half"
    tower.half().save_pretrained(half)
    expected = load_file(half / "model.safetensors")
    assert {value.dtype for value in expected.values()} == {torch.float16}
    tower, _ = read_tower(half)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    assert sorted(float(v.double().sum()) for v in tower.state_dict().values()) == pytest.approx(
        sorted(float(v.double().sum()) for v in expected.values())
    )


def test_missing_tower_names_the_cure(tmp_path):
    folder = tmp_path / "clip"
    for reason in ("the folder does not exist", "no weights in it"):
        with pytest.raises(ValueError) as caught:
            read_tower(folder)
        message = str(caught.value)
        assert f"{folder} holds no vision tower: {reason}" in message
        assert f"python scripts/download.py clip --to {folder}" in message
        assert f"--vision_model {SHIPPED_TOWER}" in message
        folder.mkdir(exist_ok=True)


@pytest.mark.parametrize("whole", [False, True], ids=["vision alone", "text and vision"])
def test_tower_that_lacks_weights_is_refused(tmp_path, tower_folder, whole):
    folder = tmp_path / "clip"
    if whole:
        whole_clip(folder)
    else:
        shutil.copytree(tower_folder, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("k_proj.weight") and "text" not in name)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the vision tower's tensors.*k_proj\.weight") as caught:
        read_tower(folder)
    assert str(path) in str(caught.value)


def break_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name] = torch.zeros(48, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def leave_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": ')


@pytest.mark.parametrize("damage", [break_shape, cut_off, leave_a_pointer, break_config])
def test_damaged_tower_is_refused(tmp_path, tower_folder, damage):
    folder = tmp_path / "clip"
    shutil.copytree(tower_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as caught:
        read_tower(folder)
    assert str(folder) in str(caught.value)


# ---- the scripts that made what is shipped


class WrappedOnce(nn.Module):
    """CLIPVisionModel as transformers 5.4 builds it: the tower one attribute deeper, so that every name is longer."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        tower = CLIPVisionModel(config)
        self.vision_model, self.config = getattr(tower, "vision_model", tower), config


@pytest.mark.parametrize("version", [CLIPVisionModel, WrappedOnce], ids=["as here", "wrapped once more"])
def test_a_tower_trained_from_another_folder_has_the_shipped_ones_names(version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = dataclasses.replace(KINDS["clip_vision_model"], model_class=version)
    monkeypatch.setitem(KINDS, "clip_vision_model", clip)
    evaluate = train_tower.evaluate
    monkeypatch.setattr(train_tower, "evaluate", lambda model, device: evaluate(model, device, count=4))
    train_tower.main(["--output", "tower", "--pictures", "4", "--batch_size", "4", "--hidden_size", "64",
                      "--num_workers", "0"])  # fmt: skip
    shipped, trained = (load_file(folder / "model.safetensors") for folder in (ROOT / SHIPPED_TOWER, Path("tower")))
    assert {name: value.dtype for name, value in trained.items()} == {n: v.dtype for n, v in shipped.items()}
    monkeypatch.undo()
    tower, _ = read_tower(tmp_path / "tower")
    assert tower.config.hidden_size == 64 and tower.config.patch_size == 16
    assert all(torch.equal(value.half(), trained[name]) for name, value in tower.state_dict().items())
    sizes = [json.loads((folder / "config.json").read_text()) for folder in (ROOT / SHIPPED_TOWER, tmp_path / "tower")]
    assert sizes[0].keys() == sizes[1].keys() and sizes[0]["architectures"] == sizes[1]["architectures"]


@pytest.mark.parametrize("script", [train_tower, train_tokenizer])
def test_the_default_output_is_the_projects_wherever_one_stands(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(train_tower, "train", lambda arguments: found.append(arguments.output))
    monkeypatch.setattr(train_tokenizer, "train", lambda: load_tokenizer())
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda self, output: found.append(output))
    script.main([])
    assert found == [{train_tower: ROOT / SHIPPED_TOWER, train_tokenizer: ROOT / "model"}[script]]
