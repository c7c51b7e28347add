"""Weight files that do not fit, or are none, are refused by name."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import minimind_tensors, rewrite, untrained_decoder
from model.weights import load_model, load_weights, read_weights, save_weights

DECODER_PARAMETERS = (
    6400 * 32  # embeddings, and the head with them
    + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 128 + 2 * 32)  # q and o, k and v, SwiGLU, norms
    + 32
)
PROJECTOR_PARAMETERS = 16 * 32 + 32


# strictness


@pytest.mark.parametrize(
    "lost",
    ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "vision_proj.vision_proj.0.bias"],
)
def test_missing_tensor_is_named(make_vlm, saved, lost):
    tensors = load_file(saved)
    del tensors[lost]
    rewrite(saved, tensors)
    for load in (load_model, lambda path: load_weights(make_vlm(seed=1), path)):
        with pytest.raises(ValueError) as caught:
            load(saved)
        assert f"missing {lost}" in str(caught.value) and str(saved) in str(caught.value)


def test_unknown_tensor_is_named(make_vlm, saved):
    rewrite(saved, {**load_file(saved), "model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    for load in (load_model, lambda path: load_weights(make_vlm(seed=1), path)):
        with pytest.raises(ValueError) as caught:
            load(saved)
        assert "unknown model.layers.0.self_attn.q_norm.weight" in str(caught.value) and str(saved) in str(caught.value)


def test_wrong_shape_is_named(make_vlm, saved):
    tensors = load_file(saved)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 32)
    rewrite(saved, tensors)
    model = make_vlm(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, saved)
    message = str(caught.value)
    assert (
        "model.layers.1.mlp.up_proj.weight is [96, 32], the model wants [128, 32]" in message and str(saved) in message
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # untouched


def test_other_sizes_are_refused_with_what_the_file_says(saved, make_vlm):
    with pytest.raises(ValueError, match="hidden_size 32, num_hidden_layers 2"):
        load_weights(make_vlm(num_hidden_layers=3), saved)
    with pytest.raises(ValueError, match=r"layers\.1\..* --num_hidden_layers"):
        load_weights(make_vlm(num_hidden_layers=1), saved)
    with pytest.raises(ValueError, match="--use_moe"):
        load_weights(make_vlm(use_moe=True), saved)


def test_projector_may_be_missing_only_when_asked(make_vlm, tmp_path):
    base, path = untrained_decoder(seed=4), tmp_path / "llm.safetensors"
    save_weights(base, path)
    with pytest.raises(ValueError, match=r"missing vision_proj\.vision_proj\.0\.weight"):
        load_weights(make_vlm(seed=1), path)
    model = make_vlm(seed=1)
    projector = model.vision_proj.vision_proj[0].weight.clone()
    report = load_weights(model, path, may_miss=("vision_proj.",))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(model.lm_head.weight, base.model.embed_tokens.weight)
    assert torch.equal(model.vision_proj.vision_proj[0].weight, projector)
    assert report.left_at_start == ["vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"]
    assert (report.matched, report.total) == (DECODER_PARAMETERS, DECODER_PARAMETERS + PROJECTOR_PARAMETERS)
    share = 100 * DECODER_PARAMETERS / (DECODER_PARAMETERS + PROJECTOR_PARAMETERS)
    assert share < 99.8
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(report) == (
        f"matched {share:.1f} % of {DECODER_PARAMETERS + PROJECTOR_PARAMETERS:,} parameters from {path} "
        f"(sha256 {sha256[:12]}); new and untrained: vision_proj.vision_proj.0.weight, vision_proj.vision_proj.0.bias"
    )


def test_whole_file_matches_a_hundred_per_cent(make_vlm, saved):
    report = load_weights(make_vlm(seed=1), saved, may_miss=("vision_proj.",))
    assert report.matched == report.total == DECODER_PARAMETERS + PROJECTOR_PARAMETERS
    assert str(report).startswith("matched 100.0 % of ") and "untrained" not in str(report)


def test_projector_may_be_ignored_only_when_asked(vlm, saved):
    decoder = untrained_decoder(seed=6)
    with pytest.raises(ValueError, match=r"unknown vision_proj\.vision_proj\.0\.weight"):
        load_weights(decoder, saved)
    report = load_weights(decoder, saved, ignore=("vision_proj.",))
    assert report.matched == report.total == DECODER_PARAMETERS
    assert torch.equal(decoder.model.embed_tokens.weight, vlm.model.embed_tokens.weight)


# files that are none


def assert_refused(path: Path) -> None:
    for load in (read_weights, load_model, lambda path: load_weights(untrained_decoder(), path)):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 200, -1000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file_is_refused(tmp_path, suffix, kept):
    path, model = tmp_path / f"llm{suffix}", untrained_decoder()
    if suffix == ".pth":
        torch.save(minimind_tensors(model), path)
    else:
        save_weights(model, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "<!DOCTYPE html><html>404</html>", "{}"],
    ids=["git-lfs pointer", "error page", "json"],
)
def test_text_file_is_refused(tmp_path, suffix, text):
    path = tmp_path / f"llm{suffix}"
    path.write_text(text)
    assert_refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_file_and_folder_are_refused(tmp_path, suffix):
    assert_refused(tmp_path / f"nowhere{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert_refused(folder)


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_pickle_that_would_run_code_does_not(tmp_path, form):
    marker, path = tmp_path / "it_ran", tmp_path / "llm.pth"
    content = {**minimind_tensors(untrained_decoder()), "bomb": Bomb(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"bomb": Bomb(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert_refused(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it was a bomb


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"state": {"a": torch.zeros(2)}}, {"epoch": 3}, torch.zeros(2), {0: torch.zeros(2)}],
    ids=["list", "nested", "number", "tensor", "number as name"],
)
def test_pth_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "llm.pth")
    assert_refused(tmp_path / "llm.pth")


def test_damaged_config_is_refused(tmp_path, saved):
    save_file(load_file(saved), saved, {"config": '{"hidden_size": 3', "format": "pt"})
    assert_refused(saved)
