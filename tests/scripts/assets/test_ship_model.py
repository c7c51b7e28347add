"""What a run has left becomes what ships: the same model in half the bytes, and nothing of who trained it."""

import pytest
import torch

from helpers.models import enliven, make_decoder
from model.messages import UserError
from model.weights import load_model, read_facts, read_weights, save_weights
from scripts.assets import ship_model


@pytest.mark.parametrize("sees", [True, False])
def test_a_shipped_model_is_the_trained_one_in_half_the_bytes(sees, make_vlm, tmp_path):
    trained, shipped = tmp_path / "sft_vlm_32.safetensors", tmp_path / "ships" / "small.safetensors"
    facts = {"stage": "sft_vlm", "step": "7", "probe": "{}", "stage_config": '{"data_path": "/home/somebody/pictures"}'}
    save_weights(enliven(make_vlm()) if sees else make_decoder(), trained, facts)
    ship_model.main(["--weight", str(trained), "--output", str(shipped)])
    assert read_facts(shipped) == {"stage": "sft_vlm", "step": "7", "probe": "{}"}
    assert b"somebody" in trained.read_bytes() and b"somebody" not in shipped.read_bytes()
    config, tensors = read_weights(shipped)
    before, wide = read_weights(trained)
    assert config == before | {"dtype": config["dtype"]} and tensors.keys() == wide.keys()
    assert all(torch.equal(tensors[name], wide[name].half()) for name in wide)
    assert type(load_model(shipped)) is type(load_model(trained))


def test_weights_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        ship_model.main(["--weight", "nowhere.safetensors", "--output", "small.safetensors"])


def test_the_decoder_alone_computes_what_it_computed_in_the_model(make_vlm, tmp_path):
    trained, base = tmp_path / "sft_vlm_32.safetensors", tmp_path / "base.safetensors"
    model = enliven(make_vlm())
    save_weights(model, trained, {"stage": "sft_vlm"})
    ship_model.main(["--weight", str(trained), "--decoder", "--output", str(base)])
    decoder, words = load_model(base), torch.arange(3, 13)[None]
    assert not hasattr(decoder, "vision_proj") and not hasattr(decoder.config, "vision_config")
    with torch.no_grad():
        expected = load_model(trained).half().float()(input_ids=words).logits
        torch.testing.assert_close(decoder.float()(input_ids=words).logits, expected)
