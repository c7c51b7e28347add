"""Names moved to where a tower has their things, and the projector in closed form beside least squares by torch."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset import emoji_world as world
from helpers.models import SIZES, make_decoder
from model.messages import UserError
from model.vision_encoder import encode_patches, normalize_pixels
from model.weights import build_vlm, load_model, read_weights, save_weights
from scripts.assets import tie_names
from scripts.assets.embed_names import COMMON, concept_directions, token_directions
from scripts.assets.train_tower import Scenes

PICTURES = 24


@pytest.fixture
def weight(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=16)).save_pretrained(tmp_path / "tower")
    model = build_vlm({**SIZES, "vocab_size": 6400}, tmp_path / "tower")
    model.model.embed_tokens.weight.data += 0.5  # as in a trained one, all have much in common
    save_weights(model, tmp_path / "sft_vlm_32.safetensors", {"stage": "sft_vlm"})
    return tmp_path / "sft_vlm_32.safetensors"


@torch.no_grad()
def test_names_and_patches_come_to_lie_alike(weight, tmp_path):
    tied = tmp_path / "out" / "tied.safetensors"
    tie_names.main(["--weight", str(weight), "--output", str(tied), "--pictures", str(PICTURES)])
    before, after = load_model(weight), load_model(tied)
    (_, old), (_, new) = read_weights(weight), read_weights(tied)
    ids, common = token_directions(concept_directions(tmp_path / "tower", PICTURES, SIZES["hidden_size"]))
    table, moved = old.pop("model.embed_tokens.weight"), new.pop("model.embed_tokens.weight")
    others = torch.ones(len(table), dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(table[others], moved[others])
    assert all(torch.equal(old[name], new[name]) for name in old if not name.startswith("vision_proj."))

    shared = table[ids].mean(0)
    own, placed = table[ids] - shared, moved[ids] - shared
    assert (own.norm(dim=-1) - placed.norm(dim=-1)).abs().max() < 1e-5
    alike = F.normalize(placed, dim=-1) @ F.normalize(placed, dim=-1).T
    wanted = common @ common.T  # angles of the tower's concepts, whichever way all of them are turned
    pairs = torch.triu_indices(len(ids), len(ids), 1).unbind()
    strangers = F.normalize(own, dim=-1) @ F.normalize(own, dim=-1).T
    assert torch.corrcoef(torch.stack([alike[pairs], wanted[pairs]]))[0, 1] > COMMON
    assert torch.corrcoef(torch.stack([strangers[pairs], wanted[pairs]]))[0, 1].abs() < 0.1

    [batch] = DataLoader(Scenes(9, "train", PICTURES, max_things=9), PICTURES)
    seen, on_thing = encode_patches(after.vision_encoder, normalize_pixels(batch["pixels"])), batch["concept"] >= 0
    things, grounds = seen[on_thing], seen[~on_thing][:: tie_names.GROUND]
    directions = tie_names.name_directions(after.model.embed_tokens.weight)[batch["concept"][on_thing]]
    length = before.vision_proj.vision_proj(things).norm(dim=-1).mean()
    targets = torch.cat([directions * length, before.vision_proj.vision_proj(grounds)])
    inputs = F.pad(torch.cat([things, grounds]), (0, 1), value=1.0)
    ridge = tie_names.RIDGE**0.5 * torch.eye(33)
    solution = torch.linalg.lstsq(torch.cat([inputs, ridge]), torch.cat([targets, torch.zeros(33, 32)])).solution
    layer = after.vision_proj.vision_proj[0]
    assert (torch.cat([layer.weight.T, layer.bias[None]]) - solution).abs().max() < 1e-3 * solution.abs().max()


def test_a_concept_lies_between_its_spellings(tokenizer):
    table = torch.zeros(len(tokenizer), 8)
    cat = world.concepts().index(next(concept for concept in world.concepts() if concept.en == "cat"))
    for spelling in ("cat", " cat", "猫"):
        table[tokenizer(spelling)["input_ids"], 3] = 1.0
    directions = tie_names.name_directions(table)
    assert directions[cat].argmax() == 3 and directions[cat, 3] > 0.99


def test_what_has_no_linear_projector_is_refused(tmp_path):
    save_weights(make_decoder(), tmp_path / "llm_32.safetensors", {"stage": "llm"})
    with pytest.raises(UserError, match="llm_32.safetensors has no linear projector"):
        tie_names.main(["--weight", str(tmp_path / "llm_32.safetensors"), "--output", str(tmp_path / "x.safetensors")])
