"""Weight files: what goes in comes out bit for bit, with the tower that it was trained with."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from helpers.models import IMAGE_SIZE, SIZES, VISION_SIZES, metadata_of, minimind_tensors, rewrite, untrained_decoder
from model import tensor_files
from model.config import MiniMindConfig, VLMConfig
from model.files import ROOT, portable_path
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.tower_folder import read_tower
from model.weights import build_vlm, infer_config, load_model, load_weights, read_sizes, read_weights, save_weights


@pytest.fixture
def other_tower(tmp_path) -> Path:
    """Of the same shape, with other weights."""
    torch.manual_seed(99)
    folder = tmp_path / "other_tower"
    CLIPVisionModel(CLIPVisionConfig(**VISION_SIZES)).save_pretrained(folder)
    return folder


def make_homeless_vlm(seed: int = 0) -> MiniMindVLM:
    """Its tower came from no folder."""
    torch.manual_seed(seed)
    return MiniMindVLM(VLMConfig(vision_config=VISION_SIZES, **SIZES)).eval()


def assert_same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []
    assert all(found[name].dtype == value.dtype for name, value in expected.items())


def see(model: MiniMindVLM) -> torch.Tensor:
    """Logits of a prompt that is one picture and two words."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 255, (1, 1, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    with torch.no_grad():
        return model(torch.tensor([[34] * 4 + [300, 400]]), image_mask=mask, pixel_values=pixels).logits


# round trip


@pytest.mark.parametrize("use_moe", [False, True])
def test_vlm_round_trip(make_vlm, tmp_path, use_moe):
    model = make_vlm(seed=3, use_moe=use_moe, num_experts=3, num_experts_per_tok=1, rms_norm_eps=1e-6)
    save_weights(model, tmp_path / "vlm.safetensors")
    torch.manual_seed(8)  # another start than the one of `model`
    loaded = load_model(tmp_path / "vlm.safetensors")
    assert type(loaded) is MiniMindVLM and not loaded.training
    assert_same_state(model, loaded)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert torch.equal(see(model), see(loaded))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("use_moe", [False, True])
def test_decoder_round_trip(tmp_path, use_moe):
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048}
    model = untrained_decoder(use_moe=use_moe, num_experts=3, intermediate_size=48, rope_parameters=yarn)
    save_weights(model, tmp_path / "llm.safetensors")
    loaded = load_model(tmp_path / "llm.safetensors")
    assert type(loaded) is MiniMindForCausalLM and not loaded.training
    assert_same_state(model, loaded)
    assert loaded.config.to_dict() == model.config.to_dict()


def test_head_of_its_own_is_kept(tmp_path):
    model, path = untrained_decoder(tie_word_embeddings=False), tmp_path / "llm.safetensors"
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    save_weights(model, path)
    torch.manual_seed(8)
    assert_same_state(model, load_model(path))


def test_bfloat16_stays_bit_equal_in_the_file(tmp_path):
    model = untrained_decoder().bfloat16()
    save_weights(model, tmp_path / "llm.safetensors")
    _, tensors = read_weights(tmp_path / "llm.safetensors")
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_file_says_what_it_is(vlm, saved, tower_folder):
    metadata = metadata_of(saved)
    config = json.loads(metadata["config"])
    assert metadata["stage"] == "sft_vlm" and metadata["format"] == "pt"
    assert {name: config[name] for name in SIZES} == SIZES
    assert config["vision_source"] == str(tower_folder.resolve())
    expected = hashlib.sha256((tower_folder / "model.safetensors").read_bytes()).hexdigest()
    assert config["vision_sha256"] == expected == vlm.config.vision_sha256
    assert {name: config["vision_config"][name] for name in VISION_SIZES} == VISION_SIZES
    assert read_sizes(saved) == config


@pytest.mark.parametrize("carried", [{}, {"image_token_id": 34}, {"image_token_id": 12}])
def test_the_token_for_pictures_is_the_file_s(vlm, saved, carried):
    config = {name: value for name, value in vlm.config.to_dict().items() if name != "image_token_id"}  # older files
    save_file(load_file(saved), saved, {**metadata_of(saved), "config": json.dumps({**config, **carried})})
    assert_same_state(vlm, load_model(saved))
    assert VLMConfig.from_dict({**config, **carried}).image_token_id == carried.get("image_token_id", 34)


def test_sizes_are_read_from_the_header_alone(vlm, saved, monkeypatch):
    """A start of a run asks for them more than once, and a file may hold gigabytes."""
    reads = []

    class Watched:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name: str):
            reads.extend(["tensor"] if name == "get_tensor" else [])
            return getattr(self.file, name)

    monkeypatch.setattr(tensor_files, "safe_open", Watched)
    sizes = read_sizes(saved)
    assert {name: sizes[name] for name in SIZES} == SIZES and not reads
    save_file(load_file(saved), saved, {"format": "pt"})  # without its config, as other programs write it
    told = read_sizes(saved, SIZES["num_attention_heads"])
    assert {name: told[name] for name in SIZES} == SIZES and not reads
    load_weights(vlm, saved)
    assert reads


def test_file_holds_neither_tower_nor_tied_head(vlm, saved):
    names = set(load_file(saved))
    assert names == {n for n in vlm.state_dict() if not n.startswith("vision_encoder.")} - {"lm_head.weight"}
    assert "vision_proj.vision_proj.0.weight" in names


def test_everybody_may_read_the_file(vlm, tmp_path):
    before = os.umask(0o077)
    try:
        save_weights(vlm, tmp_path / "vlm.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "vlm.safetensors").stat().st_mode & 0o777 == 0o644


def test_tower_without_a_folder_travels_in_the_file(tmp_path):
    model, path = make_homeless_vlm(), tmp_path / "vlm.safetensors"
    save_weights(model, path)
    torch.manual_seed(8)
    loaded = load_model(path)
    assert_same_state(model, loaded)
    assert torch.equal(see(model), see(loaded))
    save_weights(loaded, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(path).keys()


def test_tower_in_the_file_must_be_whole(tmp_path):
    path = tmp_path / "vlm.safetensors"
    save_weights(make_homeless_vlm(), path)
    tensors = load_file(path)
    lost = next(name for name in tensors if name.startswith("vision_encoder.") and name.endswith("q_proj.weight"))
    del tensors[lost]
    with pytest.raises(ValueError, match=f"missing {lost}"):
        load_model(rewrite(path, tensors))


def test_tower_in_the_file_gives_way_to_no_other(tmp_path, tower_folder):
    """Else the file's tower would run under the other's name, and the next save would drop it."""
    path = tmp_path / "vlm.safetensors"
    save_weights(make_homeless_vlm(), path)
    with pytest.raises(ValueError, match="tower"):
        load_model(path, vision_model=tower_folder)


def test_interrupted_save_leaves_the_old_file(saved, make_vlm, monkeypatch):
    before = saved.read_bytes()

    def fail(*arguments):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        save_weights(make_vlm(seed=1), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_failed_write_leaves_the_old_file(saved, make_vlm, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("model.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(make_vlm(seed=1), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_save_replaces_the_old_file(saved, make_vlm):
    newer = make_vlm(seed=1)
    save_weights(newer, saved)
    assert_same_state(newer, load_model(saved))


# wrapped models


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_of_wrappers_are_stripped(vlm, saved, tower_folder, prefix, suffix):
    tensors = {prefix + name: value for name, value in load_file(saved).items()}
    path = saved.with_name("wrapped" + suffix)
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata_of(saved))
    loaded = load_model(path, vision_model=tower_folder, num_attention_heads=4)
    assert_same_state(vlm, loaded)


# MiniMind's own files


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("layers", [2, 11])  # eleven: "10" sorts before "2"
def test_minimind_pth_of_a_vlm(make_vlm, tmp_path, tower_folder, use_moe, layers):
    model = make_vlm(use_moe=use_moe, num_experts=3, num_hidden_layers=layers, intermediate_size=72)
    tensors = minimind_tensors(model)
    assert "lm_head.weight" in tensors
    torch.save(tensors, tmp_path / "sft_vlm_32.pth")
    loaded = load_model(tmp_path / "sft_vlm_32.pth", vision_model=tower_folder, num_attention_heads=4)
    assert type(loaded) is MiniMindVLM
    sizes = {**SIZES, "num_hidden_layers": layers, "intermediate_size": 72, "vocab_size": 6400, "use_moe": use_moe}
    if use_moe:
        sizes["num_experts"] = 3
    assert {name: getattr(loaded.config, name) for name in sizes} == sizes
    for name, value in tensors.items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name
    torch.testing.assert_close(see(loaded), see(model), rtol=0, atol=1e-2)  # fp16 has eleven bits


def test_minimind_pth_of_a_decoder(tmp_path):
    model = untrained_decoder()
    torch.save(minimind_tensors(model), tmp_path / "full_sft_32.pth")
    loaded = load_model(tmp_path / "full_sft_32.pth", num_attention_heads=4)
    assert type(loaded) is MiniMindForCausalLM
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight.half())


@pytest.mark.parametrize("hidden_size", [512, 768])
@pytest.mark.parametrize("use_moe", [False, True])
def test_published_sizes_are_inferred(hidden_size, use_moe):
    with torch.device("meta"):
        config = MiniMindConfig(hidden_size=hidden_size, use_moe=use_moe, num_hidden_layers=3)
        found = infer_config(MiniMindForCausalLM(config).state_dict())
    assert found == {name: getattr(config, name) for name in found}
    assert found["num_key_value_heads"] == 2 and found["hidden_size"] == hidden_size


def test_minimind_pth_with_a_head_of_its_own_is_refused(tmp_path):
    """One of the two would overwrite the other."""
    tensors = minimind_tensors(untrained_decoder())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, tmp_path / "untied.pth")
    with pytest.raises(ValueError, match=r"untied\.pth.*lm_head\.weight"):
        load_model(tmp_path / "untied.pth", num_attention_heads=4)


def test_minimind_pth_needs_to_be_told_the_tower(vlm, tmp_path):
    torch.save(minimind_tensors(vlm), tmp_path / "sft_vlm_32.pth")
    with pytest.raises(ValueError, match=r"sft_vlm_32\.pth.*--vision_model"):
        load_model(tmp_path / "sft_vlm_32.pth", num_attention_heads=4)


@pytest.mark.parametrize(
    "lost",
    [
        "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate_proj.weight", "model.norm.weight",
    ],
)  # fmt: skip
def test_minimind_pth_without_a_tensor_is_refused(tmp_path, lost):
    tensors = minimind_tensors(untrained_decoder())
    del tensors[lost]
    torch.save(tensors, tmp_path / "broken.pth")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "broken.pth", num_attention_heads=4)
    assert lost in str(caught.value) and "broken.pth" in str(caught.value)


def test_file_of_something_else_is_refused(tower_folder):
    """Tensors, but no decoder's: a person named the tower's file."""
    path = tower_folder / "model.safetensors"
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


# which tower


def test_another_tower_is_refused(saved, vlm, other_tower):
    with pytest.raises(ValueError, match="another tower") as caught:
        load_model(saved, vision_model=other_tower)
    message, other_sha256 = str(caught.value), read_tower(other_tower)[1]
    assert vlm.config.vision_sha256[:12] in message and other_sha256[:12] in message
    assert str(saved) in message and "--vision_model" in message


def test_another_tower_in_the_same_place_is_refused(tmp_path, tower_folder, other_tower):
    place, path = tmp_path / "place", tmp_path / "vlm.safetensors"
    shutil.copytree(tower_folder, place)
    save_weights(build_vlm(SIZES, place), path)
    load_model(path)
    shutil.copy(other_tower / "model.safetensors", place)
    with pytest.raises(ValueError, match="another tower"):
        load_model(path)


def test_next_stage_refuses_another_tower(saved, other_tower):
    """A projector fits only the tower that it was trained with, whether to answer or to train on."""
    with pytest.raises(ValueError, match="another tower"):
        load_weights(build_vlm(SIZES, other_tower), saved)


def test_moved_tower_is_found_when_named(saved, vlm, tmp_path, tower_folder):
    shutil.copytree(tower_folder, tmp_path / "moved")
    loaded = load_model(saved, vision_model=tmp_path / "moved")
    assert_same_state(vlm, loaded)
    assert loaded.config.vision_source == str((tmp_path / "moved").resolve())


def test_lost_tower_is_named(tmp_path, tower_folder):
    shutil.copytree(tower_folder, tmp_path / "place")
    save_weights(build_vlm(SIZES, tmp_path / "place"), tmp_path / "vlm.safetensors")
    shutil.rmtree(tmp_path / "place")
    with pytest.raises(ValueError, match="place holds no vision tower: the folder does not exist"):
        load_model(tmp_path / "vlm.safetensors")


def test_paths_inside_the_project_are_written_from_its_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable_path("model") == "model"
    assert portable_path(ROOT / "model") == "model"
    (tmp_path / "mine").mkdir()
    assert portable_path("mine") == str((tmp_path / "mine").resolve())
