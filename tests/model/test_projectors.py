"""Projectors: shapes and names, and pixel shuffle before each of them, held to a slow loop."""

import pytest
import torch
from torch.nn import functional as F

from helpers.models import SIZES, VISION_SIZES
from model.config import VLMConfig
from model.flops import StepFlops
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.projectors import PROJECTORS, build_projector, fold_patches, projector_named
from model.weights import load_model, save_weights

NAMES = {
    "linear": {"vision_proj.0"},
    "mlp": {"linear_1", "linear_2"},
    "norm_mlp": {"mlp.0", "mlp.1", "mlp.3"},
}
VISION = {**VISION_SIZES, "image_size": 224, "patch_size": 16}  # 14 x 14 patches


def slow_fold(patches: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    pictures = []
    for picture in patches.view(len(patches), side, side, -1):
        tokens = []
        for top in range(0, side, rows):
            for left in range(0, side, columns):
                inside = [picture[top + row, left + column] for row in range(rows) for column in range(columns)]
                tokens.append(torch.cat(inside))
        pictures.append(torch.stack(tokens))
    return torch.stack(pictures)


@pytest.mark.parametrize(
    "tokens, fold, grid",
    [(None, (1, 1), (14, 14)), (196, (1, 1), (14, 14)), (98, (1, 2), (14, 7)), (49, (2, 2), (7, 7)),
     (14, (2, 7), (7, 2)), (4, (7, 7), (2, 2)), (1, (14, 14), (1, 1))],
)  # fmt: skip
def test_pixel_shuffle_is_what_a_slow_loop_does(tokens, fold, grid):
    config = VLMConfig(vision_config=VISION, image_tokens=tokens, **SIZES)
    assert (config.fold, config.image_grid, config.image_tokens) == (fold, grid, tokens or 196)
    patches = torch.randn(2, 196, 3)
    assert torch.equal(fold_patches(patches, 14, fold), slow_fold(patches, 14, *fold))


@pytest.mark.parametrize("tokens", [50, 64, 392, -1])
def test_tokens_that_the_grid_does_not_give_are_refused(tokens):
    with pytest.raises(UserError, match=rf"image_tokens {tokens} cannot be made of 14 x 14 patches: 196, 98, 49, "):
        VLMConfig(vision_config=VISION, image_tokens=tokens)


@pytest.mark.parametrize("tokens", [196, 98, 49])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_projector_has_its_names_and_shapes(kind, tokens, tmp_path):
    torch.manual_seed(0)
    config = VLMConfig(vision_config=VISION, projector=kind, image_tokens=tokens, **SIZES)
    projector = build_projector(config)
    assert {name.rpartition(".")[0] for name in projector.state_dict()} == NAMES[kind]
    assert projector_named(projector.state_dict()) == kind
    first = projector.get_submodule({"linear": "vision_proj.0", "mlp": "linear_1", "norm_mlp": "mlp.1"}[kind])
    assert first.in_features == 16 * 196 // tokens and first.out_features == SIZES["hidden_size"]
    patches = torch.randn(2, 196, 16)
    x = slow_fold(patches, 14, *config.fold)
    weights = dict(projector.named_parameters())
    if kind == "norm_mlp":
        x = F.layer_norm(x, x.shape[-1:], weights["mlp.0.weight"], weights["mlp.0.bias"])
    x = F.linear(x, first.weight, first.bias)
    if kind != "linear":
        last = projector.linear_2 if kind == "mlp" else projector.mlp[3]
        x = F.linear(F.gelu(x), last.weight, last.bias)
    assert x.shape == (2, tokens, SIZES["hidden_size"])
    torch.testing.assert_close(projector(patches), x)
    model = MiniMindVLM(config).eval()
    save_weights(model, tmp_path / "vlm.safetensors")
    again = load_model(tmp_path / "vlm.safetensors")
    assert (again.config.projector, again.config.image_tokens) == (kind, tokens)
    assert torch.equal(again.vision_proj(patches), model.vision_proj(patches))


def test_unknown_projectors_are_refused():
    with pytest.raises(UserError, match="projector 'conv' is not known: choose from linear, mlp, norm_mlp"):
        build_projector(VLMConfig(projector="conv"))
    with pytest.raises(UserError, match=r"query\.weight are of none of linear, mlp, norm_mlp"):
        projector_named(["query.weight"])


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_linear_layer_of_a_projector_is_counted(kind):
    model = MiniMindVLM(VLMConfig(vision_config=VISION, projector=kind, image_tokens=49, **SIZES))
    wide, hidden = 4 * 16 * 32, 32 * 32  # multiply-adds a token: the first layer, the second
    forward = 2 * 49 * (wide + (kind != "linear") * hidden)
    model.requires_grad_(False)
    assert StepFlops(model).per_picture == forward
    model.vision_proj.requires_grad_(True)  # weights of both, and the gradient of what enters all but the first
    learning = 2 * forward + (kind != "linear") * 2 * 49 * hidden + (kind == "norm_mlp") * 2 * 49 * wide
    assert StepFlops(model).per_picture == learning


def test_a_batch_without_pictures_reaches_every_parameter():
    model = MiniMindVLM(VLMConfig(vision_config=VISION, projector="norm_mlp", image_tokens=49, **SIZES)).train()
    ids = torch.randint(40, 6400, (1, 6))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.vision_proj.parameters())
