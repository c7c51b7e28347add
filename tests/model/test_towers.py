"""Every kind of tower: the same numbers as its own class, its own looks of a picture, one token a patch."""

import json

import pytest
import torch

from helpers.models import IMAGE_SIZE, SIZES, VISION_SIZES
from helpers.towers import MAKERS, make_tower, own_features
from model.config import VLMConfig
from model.flops import tower_flops
from model.messages import UserError
from model.tower_folder import read_tower, tower_sizes
from model.vision_encoder import PIXEL_MEAN, PIXEL_STD, encode_patches, normalize_pixels
from model.weights import build_vlm, load_model, save_weights

PIXELS = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
BYTES = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(3)).byte()
LEADING = {"clip": 1, "clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 5}  # the others have none
LOOKS = {  # mean and deviation that a folder does not need to say
    "clip": (PIXEL_MEAN, PIXEL_STD), "clip_vision_model": (PIXEL_MEAN, PIXEL_STD),
    "siglip": ((0.5,) * 3, (0.5,) * 3), "siglip_vision_model": ((0.5,) * 3, (0.5,) * 3),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "dinov2_with_registers": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}  # fmt: skip


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5: convolutions add up in an order that depends on where their weights lie in memory."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MAKERS)
def test_tower_gives_what_its_own_class_gives(kind, tmp_path, capfd):
    expected = own_features(make_tower(kind, tmp_path), PIXELS)
    capfd.readouterr()
    tower, _ = read_tower(tmp_path)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())  # the text half, the pooling head
    assert_same(own_features(tower, PIXELS), expected)
    patches = encode_patches(tower, PIXELS)
    assert_same(patches, expected[:, LEADING.get(kind, 0) :])
    assert patches.std() > 0.1
    model = build_vlm(SIZES, tmp_path, {"projector": "norm_mlp"}).eval()  # which reads the last hidden state of all
    assert patches.shape == (2, model.config.image_tokens, model.config.vision_hidden_size) and patches.shape[1] == 4
    mean, std = LOOKS.get(kind, (127 / 255, 128 / 255))
    by_hand = (BYTES.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    seen = own_features(tower, by_hand)[:, LEADING.get(kind, 0) :]
    assert_same(model.encode_pictures(BYTES), seen)
    assert tower_flops(model.vision_encoder, IMAGE_SIZE) > 0


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_siglip_is_read_before_its_last_norm_as_llava_reads_it(projector, tmp_path):
    theirs = make_tower("siglip_vision_model", tmp_path).eval()
    model = build_vlm(SIZES, tmp_path, {"projector": projector}).eval()
    with torch.no_grad():
        output = theirs(PIXELS, output_hidden_states=True)
    assert_same(model.encode_pictures(PIXELS), output.hidden_states[-1])
    assert not torch.allclose(output.hidden_states[-1], output.last_hidden_state, atol=0.1)


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_bring_tower_and_looks_back(kind, tmp_path):
    make_tower(kind, tmp_path / "tower", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    model = build_vlm(SIZES, tmp_path / "tower").eval()
    expected = model.encode_pictures(BYTES)
    save_weights(model, tmp_path / "named.safetensors")
    model.config.vision_source = None  # it travels in the file
    save_weights(model, tmp_path / "inside.safetensors")
    (tmp_path / "tower/preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')  # what was trained with stays
    for name in ("named", "inside"):
        again = load_model(tmp_path / f"{name}.safetensors")
        assert again.config.vision_config["image_mean"] == [0.1, 0.2, 0.3]
        assert_same(again.encode_pictures(BYTES), expected)


def test_older_configs_mean_clip_as_it_was():
    config = VLMConfig(vision_config=VISION_SIZES, **SIZES)
    assert (config.projector, config.image_tokens, config.image_grid) == ("linear", 4, (2, 2))
    assert VLMConfig().image_tokens == 196


@pytest.mark.parametrize("patch, size, tokens", [(16, 224, 196), (32, 224, 49), (14, 224, 256), (14, 336, 576)])
def test_openais_sizes_give_their_tokens(tmp_path, patch, size, tokens):
    vision = {"image_size": size, "patch_size": patch, "hidden_size": 1024, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": size, "size": size}))
    config = VLMConfig(vision_config=tower_sizes(tmp_path))
    assert (config.image_tokens, config.image_size, config.vision_hidden_size) == (tokens, size, 1024)


def test_dinov2_sees_pictures_of_the_size_that_its_folder_names(tmp_path):
    """openai's CLIP has one position a patch; DINOv2 was trained at 518 pixels and looks at 224, positions between."""
    size = {"height": 48, "width": 48}
    model = make_tower("dinov2", tmp_path, crop_size=size, size={"shortest_edge": 64}, image_std=[1, 1, 1])
    ours = build_vlm(SIZES, tmp_path).eval()
    assert (ours.config.image_size, ours.config.image_tokens) == (48, 9)
    pixels = torch.randint(0, 256, (1, 3, 48, 48)).byte()
    entering = normalize_pixels(pixels, (0.485, 0.456, 0.406), (1, 1, 1))
    assert torch.equal(ours.encode_pictures(pixels), own_features(model, entering)[:, 1:])
    save_weights(ours, tmp_path / "vlm.safetensors")
    assert load_model(tmp_path / "vlm.safetensors").config.image_tokens == 9


def test_clip_keeps_its_size_whatever_the_preprocessor_says(tmp_path):
    make_tower("clip", tmp_path, crop_size=48, size={"shortest_edge": 48})
    assert VLMConfig(vision_config=tower_sizes(tmp_path)).image_size == IMAGE_SIZE


def test_whole_processors_are_read_too(tmp_path):
    make_tower("siglip", tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.1, 0.1, 0.1]}}')
    assert tower_sizes(tmp_path)["image_mean"] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "vit"}, "holds a vit, which is no tower that is known: clip, siglip, clip_vision_model, "),
        ({"model_type": "siglip2"}, "NaFlex.*take one of a fixed size"),
        ({"model_type": "dinov2", "image_size": [64, 32]}, "image_size 64 x 32 is not square"),
        ({"model_type": "clip_vision_model", "num_channels": 4}, "for 4 channels"),
        ({"model_type": "efficientnet_lite", "image_size": 250}, "250 .* multiple of 16"),
        ([], "it holds no settings"),
    ],
)
def test_towers_that_cannot_be_read_are_refused_by_name(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for read in (tower_sizes, read_tower):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    "looks, message",
    [
        ({"image_std": [0.5, 0.5, 0]}, "image_std .* must be above 0"),
        ({"image_mean": [0.5]}, "image_mean .* must be three numbers"),
        ({"size": {"height": 40, "width": 40}}, "size 40 is no multiple of the patch size 16"),
        ({"size": {"height": 48, "width": 32}}, "size 48 x 32 is not square"),
    ],
)
def test_looks_that_cannot_be_are_refused(tmp_path, looks, message):
    make_tower("dinov2", tmp_path, **looks)
    with pytest.raises(UserError, match=message):
        tower_sizes(tmp_path)


def test_efficientnet_stays_in_float32_and_never_learns(tmp_path):
    make_tower("efficientnet_lite", tmp_path)
    model = build_vlm(SIZES, tmp_path).train()
    before = {name: value.clone() for name, value in model.vision_encoder.state_dict().items()}
    exact = model.encode_pictures(BYTES)
    model.round_tower(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_pictures(BYTES), exact)
    after = model.vision_encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
