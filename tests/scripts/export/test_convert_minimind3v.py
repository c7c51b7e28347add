"""MiniMind-3V's files come in and go out again, tensor by tensor, and become folders that others read."""

import json
import shutil

import pytest
import torch

from helpers.exports import bare_decoder, differences, export, make_seeing, prove_here
from helpers.minimind3v import MiniMind3V, write_minimind3v, write_tokenizer
from helpers.models import broken_files
from model.files import file_sha256
from model.messages import UserError
from model.tokenizer_files import read_tokenizer
from model.weights import load_model, save_weights
from scripts.convert_vlm import convert, parse_arguments, read_source

BAR = 1e-5  # largest difference of an fp32 logit


@pytest.fixture(scope="module", params=["dense", "moe"])
def published(request, tmp_path_factory) -> MiniMind3V:
    return write_minimind3v(tmp_path_factory.mktemp(request.param), use_moe=request.param == "moe")


def test_there_and_back(published, tmp_path):
    """Through a file of ours, which carries tower, tokenizer and placeholder by itself."""
    model, tokenizer = load_model(published.pth, published.tower), read_tokenizer(published.pth)
    save_weights(model, tmp_path / "ours.safetensors")
    folder = export(load_model(tmp_path / "ours.safetensors"), "minimind3v", tmp_path / "again", tokenizer)
    there, back = (torch.load(path, weights_only=True) for path in (published.pth, folder / "tiny.pth"))
    assert there.keys() == back.keys()
    for name, value in there.items():
        assert back[name].dtype == torch.float16 and torch.equal(back[name], value), name
    assert differences(model, folder, tmp_path / "reference", str(published.tower), tokenizer)["texts"]
    assert load_model(folder / "tiny.pth", published.tower).config.image_token_id == 12


def test_it_becomes_a_folder_with_code_and_its_decoder_a_stock_one(published, tmp_path):
    model, tokenizer = load_model(published.pth, published.tower), read_tokenizer(published.pth)
    with pytest.raises(UserError, match="the projector norm_mlp.*--to transformers"):
        export(model, "llava", tmp_path / "llava", tokenizer)
    for format_name, converted in (("transformers", model), ("llm", bare_decoder(model))):
        folder = export(converted, format_name, tmp_path / format_name, tokenizer)
        found = differences(converted, folder, tmp_path / f"{format_name} reference", tokenizer=tokenizer)
        assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]
    kind = json.loads((tmp_path / "llm" / "config.json").read_text())["model_type"]
    assert kind == ("qwen3_moe" if published.use_moe else "qwen3")


def test_whole_conversion_of_a_folder(published, tmp_path, monkeypatch):
    """By the command: from their folder to their .pth, with card and manifest; the tower is named, not packed."""
    prove_here(monkeypatch)
    source = published.write_folder(tmp_path / "minimind-3v")
    flags = ["--to", "minimind3v", "--output", tmp_path / "out", "--vision_model", published.tower]
    manifest = convert(parse_arguments(["--weight", str(source), *map(str, flags)]))
    assert manifest["largest_logit_difference"] <= BAR and broken_files(tmp_path / "out") == []
    assert manifest["vision_tower"] == {"name": "siglip2", "sha256": sha_of(published.tower), "included": False}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SigLIP, 64 pixels a side: siglip2" in card and "| projector | norm_mlp |" in card
    assert ("4, 1 a token |" in card) == published.use_moe
    tensors = torch.load(tmp_path / "out" / "minimind-3v.pth", weights_only=True)
    assert all(torch.equal(tensors[name].float(), value) for name, value in published.tensors.items())


def sha_of(tower) -> str:
    return file_sha256(tower / "model.safetensors")


def test_a_file_without_its_tokenizer_says_so(published, tmp_path):
    alone = tmp_path / published.pth.name
    shutil.copy(published.pth, alone)
    with pytest.raises(UserError, match="put its tokenizer.json and tokenizer_config.json beside it"):
        load_model(alone, published.tower)
    options = ["--weight", alone, "--to", "minimind3v", "--output", tmp_path / "out", "--vision_model", published.tower]
    source = read_source(parse_arguments([*map(str, options), "--tokenizer", str(published.pth.parent)]))
    assert source.model.config.image_token_id == 12


SIZES = {"qk_norm": True, "rms_norm_eps": 1e-6, "vocab_size": 292, "image_token_id": 12, "projector": "norm_mlp"}


@pytest.mark.parametrize(
    ("tower", "changes", "reason"),
    [
        ("siglip_vision_model", {"qk_norm": False}, "its decoder has q/k norms"),
        ("siglip_vision_model", {"projector": "mlp"}, "the projector mlp and not norm_mlp"),
        ("clip_vision_model", {}, "a clip_vision_model and not a siglip_vision_model"),
        ("siglip_vision_model", {"image_tokens": 4}, "patches folded into 4 tokens"),
        ("siglip_vision_model", {"image_token_id": 34}, "token 34 for pictures"),
        ("siglip_vision_model", {"rms_norm_eps": 1e-5}, "cannot tell rms_norm_eps 1e-05"),
        ("siglip_vision_model", {"rope_theta": 1e4}, "cannot tell rope_parameters"),
        ("siglip_vision_model", {"qkv_bias": True, "output_bias": True}, "cannot tell qkv_bias True, output_bias True"),
        ("siglip_vision_model", {"use_moe": True, "num_experts_per_tok": 2}, "cannot tell num_experts_per_tok 2"),
        ("siglip_vision_model", {"eos_token_id": 5}, "cannot tell eos_token_id 5"),
        ("siglip_vision_model", {}, "travels with the model"),
    ],
)
def test_what_the_layout_cannot_tell_is_refused(tower, changes, reason, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    model = make_seeing(tower, **{**SIZES, **changes})
    with pytest.raises(UserError, match=reason) as refused:
        export(model, "minimind3v", tmp_path / "out", read_tokenizer(tmp_path / "tokenizer"))
    assert "--to transformers" in str(refused.value) or "travels" in reason
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("tower", "changes", "reason"),
    [
        ("clip_vision_model", {"qk_norm": True}, "no q/k norms"),
        ("clip_vision_model", {"projector": "norm_mlp"}, "the projector norm_mlp and not linear"),
        ("clip_vision_model", {"image_tokens": 8}, "patches folded into 8 tokens"),
        ("siglip_vision_model", {}, "a siglip_vision_model and not a clip_vision_model"),
        ("clip_vision_model", {"image_token_id": 12}, "token 12 for pictures and not @, 34"),
    ],
)
def test_the_older_layout_refuses_the_newer(tower, changes, reason, tmp_path):
    with pytest.raises(UserError, match=f"{reason}.*--to transformers"):
        export(make_seeing(tower, **changes), "minimind", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
