"""Names' embeddings from a tower's patches, beside Mahalanobis' angles between the concepts' means."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset import emoji_world as world
from model.messages import UserError
from model.tower_folder import read_tower, tower_sizes
from model.vision_encoder import encode_patches, normalize_pixels, pixel_statistics
from scripts.assets import embed_names
from scripts.assets.train_tower import Scenes

PICTURES, HIDDEN = 24, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=16))
    folder = tmp_path_factory.mktemp("tower")
    tower.save_pretrained(folder)
    return folder


@torch.no_grad()
def angles(folder) -> torch.Tensor:
    """Cosines [concepts, concepts] between means, in the metric of the spread within concepts."""
    tower, _ = read_tower(folder)
    [batch] = DataLoader(Scenes(9, "train", PICTURES, max_things=9), PICTURES)
    pixels = normalize_pixels(batch["pixels"], *pixel_statistics(tower_sizes(folder)))
    patches, concept = encode_patches(tower, pixels).double().flatten(0, 1), batch["concept"].flatten()
    means, deviations = torch.zeros(len(world.concepts()), HIDDEN, dtype=torch.float64), []
    for number in set(concept.tolist()) - {-1}:
        own = patches[concept == number]
        means[number] = own.mean(0)
        deviations.append(own - own.mean(0))
    deviations = torch.cat(deviations)
    spread = deviations.T @ deviations / (len(deviations) - 1)
    spread += 1e-3 * spread.diagonal().mean() * torch.eye(HIDDEN)
    centred = means - means.mean(0)
    products = centred @ torch.linalg.solve(spread, centred.T)
    lengths = products.diagonal().sqrt()
    return products / lengths[:, None] / lengths


def test_directions_keep_the_angles_and_a_narrower_decoder_the_largest_part_of_them(folder):
    expected = angles(folder)
    whole = embed_names.concept_directions(folder, PICTURES, HIDDEN).double()
    assert whole.shape == (len(world.concepts()), HIDDEN)
    assert (whole @ whole.T - expected).abs().max() < 1e-3
    narrow = embed_names.concept_directions(folder, PICTURES, 20).double()
    assert narrow.shape == (len(world.concepts()), 20)
    assert (narrow.norm(dim=-1) - 1).abs().max() < 1e-5
    errors = []
    for kept in (narrow, whole[:, -20:], whole[:, ::2]):
        unit = F.normalize(kept, dim=-1)
        errors.append((unit @ unit.T - expected).square().mean().item())
    assert errors[0] < 0.1 * min(errors[1:])  # a hundredth of what other directions would lose


def test_a_decoder_wider_than_the_tower_is_refused(folder):
    with pytest.raises(UserError, match=f"--hidden_size {HIDDEN + 1} is more than the {HIDDEN} of"):
        embed_names.concept_directions(folder, PICTURES, HIDDEN + 1)


def test_names_of_a_narrow_decoder(folder, tmp_path, monkeypatch, tokenizer):
    output = tmp_path / "out" / "names.safetensors"
    flags = ["--vision_model", folder, "--output", output, "--pictures", 8, "--hidden_size", 24]
    monkeypatch.setattr(sys, "argv", ["embed_names.py", *map(str, flags)])
    embed_names.main()
    tensors = load_file(output)
    embeddings, ids = tensors["embeddings"], tensors["token_ids"].tolist()
    assert embeddings.shape == (len(ids), 24) and ids == sorted(set(ids))
    lengths = embeddings.norm(dim=-1) / embed_names.LENGTH
    assert 0.9 < lengths.mean() < 1.1 and lengths.min() > 0.5 and lengths.max() < 1.5
    assert set(tokenizer("cat")["input_ids"]) | set(tokenizer("猫")["input_ids"]) <= set(ids)
