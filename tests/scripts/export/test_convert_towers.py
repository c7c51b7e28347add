"""Other towers and projectors, converted: what stock Llava holds, what our own folder holds, what is refused."""

import pytest
import torch

from helpers.models import IMAGE_SIZE, SIZES, enliven_all
from helpers.towers import make_tower
from model.inference.stock_reader import load_folder
from model.messages import UserError
from model.processing import load_tokenizer
from model.weights import build_vlm
from scripts.export.formats import FORMATS, Source
from scripts.export.proof import compare, write_reference

BAR = 1e-5


@pytest.fixture
def vlm_with(tmp_path):
    """vlm_with(kind, projector=..., image_tokens=...): a tiny model whose logits vary."""

    def make(kind: str, **seeing):
        make_tower(kind, tmp_path / "tower", image_mean=[0.4, 0.5, 0.6])
        return enliven_all(build_vlm(SIZES, tmp_path / "tower", seeing)).eval()

    return make


def differences(source: Source, format_name: str, tmp_path) -> dict:
    folder, reference = tmp_path / "folder", tmp_path / "reference"
    for made in (folder, reference):
        made.mkdir()
    FORMATS[format_name](source, folder)
    write_reference(source.model, source.tokenizer, reference, True)
    return compare(folder, reference, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mlp_projector_is_stock_llavas_as_it_is(vlm_with, tmp_path, dtype):
    source = Source(vlm_with("clip", projector="mlp"), load_tokenizer(), "tiny", dtype)
    found = differences(source, "llava", tmp_path)
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]


@pytest.mark.parametrize(
    "kind, projector, tokens",
    [("siglip", "norm_mlp", 2), ("dinov2_with_registers", "mlp", 1), ("efficientnet_lite", "linear", 4)],
)
def test_our_own_folder_takes_every_tower_and_projector(vlm_with, tmp_path, kind, projector, tokens):
    model = vlm_with(kind, projector=projector, image_tokens=tokens)
    found = differences(Source(model, load_tokenizer(), "tiny"), "transformers", tmp_path)
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]
    again, processor = load_folder(tmp_path / "folder")
    assert (again.config.projector, processor.image_tokens) == (projector, tokens)
    pixels = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE)).byte()
    torch.testing.assert_close(again.encode_pictures(pixels), model.encode_pictures(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind, projector, tokens, format_name, message",
    [
        ("siglip", "mlp", 4, "llava", "--to llava: stock Llava reads a siglip_vision_model otherwise"),
        ("clip", "norm_mlp", 4, "llava", "neither a NormMLPProjector nor folded patches"),
        ("clip", "mlp", 2, "llava", "neither a MLPProjector nor folded patches"),
        ("clip", "mlp", 4, "minimind", "a .pth cannot tell projector mlp with image_tokens 4"),
        ("clip", "linear", 1, "minimind", "a .pth cannot tell projector linear with image_tokens 1"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(vlm_with, tmp_path, kind, projector, tokens, format_name, message):
    model = vlm_with(kind, projector=projector, image_tokens=tokens)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        FORMATS[format_name](Source(model, load_tokenizer(), "tiny"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
