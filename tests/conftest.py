"""Tiny models, a tiny tower and a tiny data set: everything that tests need, made here, nothing fetched."""

import logging
import os
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from helpers.data import make_picture, write_jsonl
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS, SIZES
from model.config import MiniMindConfig
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from model.weights import build_vlm, save_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)  # tiny models lose more to threads than they gain


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """transformers writes into its log what it will drop, once a process: in whichever test meets it first."""
    said, log = [], logging.getLogger("transformers")
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    log.addHandler(listener)
    yield
    log.removeHandler(listener)
    assert not [message for message in said if "deprecated" in message or "will be removed" in message]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def processor(tokenizer):
    return VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE)


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory) -> Path:
    """A random CLIP vision tower of 4 patches, saved as transformers does."""
    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=16))
    with torch.no_grad():  # transformers 5.4 and 5.24 draw them in another order, and some tests live by one tower
        for _, parameter in sorted(tower.named_parameters(), key=lambda named: named[0].removeprefix("vision_model.")):
            parameter.copy_(0.02 * torch.randn(parameter.shape) + (parameter.ndim == 1 and parameter.mean().round()))
    tower.save_pretrained(folder)
    return folder


@pytest.fixture
def make_vlm(tower_folder):
    """make_vlm(use_moe=..., seed=...): a tiny MiniMindVLM in eval mode."""

    def make(seed: int = 0, **changes):
        torch.manual_seed(seed)
        return build_vlm({**SIZES, **changes}, tower_folder).eval()

    return make


@pytest.fixture
def vlm(make_vlm):
    return make_vlm()


@pytest.fixture
def saved(vlm, tmp_path) -> Path:
    path = tmp_path / "out" / "vlm.safetensors"
    save_weights(vlm, path, {"stage": "sft_vlm"})
    return path


@pytest.fixture
def tiny_config() -> MiniMindConfig:
    return MiniMindConfig(**SIZES)


@pytest.fixture
def picture():
    return make_picture


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with images/a.png, b.png and c.png and one picture outside of images/."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("a", "b", "c")):
        make_picture(number).save(tmp_path / "images" / f"{name}.png")
    make_picture(9).save(tmp_path / "outside.png")
    return tmp_path


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """train.jsonl with 24 samples beside images/: one picture, two, none; answers of different lengths."""
    images = tmp_path / "images"
    images.mkdir()
    records = []
    for number in range(24):
        count = (1, 2, 0)[number % 3]
        names = [f"{number}_{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            make_picture(100 * number + k).save(images / name)
        question = "<image>" * count + f"\nWhat is number {number}?"
        answer = " ".join(["cat"] * (1 + number % 5))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"image": names, "conversations": turns})
    write_jsonl(tmp_path / "train.jsonl", records)
    return tmp_path
