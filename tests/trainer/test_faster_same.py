"""What makes a step faster changes nothing: compiled layers, a tower rounded once, pictures counted by the host."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from helpers.data import make_picture
from helpers.runs import tiny
from model.device import compile_layers
from model.processing import collate_training
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


def batch_of(processor, counts: tuple[int, ...]) -> dict:
    """A row for each number of pictures."""
    rows = []
    for count in counts:
        rendered = processor.render([{"role": "user", "content": "<image>" * count + "What is it?"}])
        rows.append((rendered, [processor.pixels(make_picture(10 * count + n)) for n in range(count)]))
    return collate_training(rows)


@pytest.mark.parametrize("counts", ((0, 2, 1, 3), (1, 1), (0, 0)))
def test_pictures_that_the_host_counted_go_to_the_same_places(make_vlm, processor, counts):
    batch, model = batch_of(processor, counts), make_vlm()
    inputs = {name: batch.get(name) for name in ("input_ids", "image_mask", "pixel_values")}
    assert torch.equal(model.embed(**inputs), model.embed(**inputs, pictures_a_row=batch["pictures_a_row"]))


def test_a_rounded_tower_says_what_autocast_says(make_vlm, processor):
    model, pixels = make_vlm(), batch_of(processor, (1, 1))["pixel_values"][:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.encode_pictures(pixels)
        model.round_tower(torch.bfloat16)
        assert model.vision_encoder.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
        assert torch.equal(model.encode_pictures(pixels), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_stage_learns_what_an_eager_one_does(data_folder, tower_folder):
    """Also where its compiled layers are computed again in the backward pass."""
    config = tiny(SFT_VLM, data_folder, tower_folder, num_hidden_layers=1, batch_size=4)
    losses = []
    for compiled in (0, 1):
        config = dataclasses.replace(config, compile=compiled, checkpoint_activations=compiled)
        config = dataclasses.replace(config, save_dir=f"{data_folder}/{compiled}")
        run_stage(config)
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == 6


def test_a_machine_without_a_compiler_is_told(make_vlm, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(inductor_config.cpp, "cxx", ("/no/such/compiler",))
    message = r"--compile 1: .* install a C\+\+ compiler .*--compile 0"
    with fresh_cache(), pytest.raises(ValueError, match=message):
        compile_layers(make_vlm(), torch.device("cpu"))
