"""Converted models answer what ours answer: in fresh processes, dense and MoE, with pictures and without."""

import json
import re
import sys
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig, CLIPModel

from helpers.exports import bare_decoder, differences, export, prove_here
from helpers.models import YARN, broken_files
from helpers.repository import ROOT
from model.pictures import open_picture
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from model.weights import build_vlm, load_model, save_weights
from scripts import convert_vlm
from scripts.convert_vlm import convert, parse_arguments
from scripts.export import proof as export_proof
from scripts.export.folder import MANIFEST
from scripts.export.formats import FORMATS
from scripts.export.proof import PICTURES, draw_picture

BAR = 1e-5  # largest difference of an fp32 logit
DENSE, MOE = {}, {"use_moe": True}


@pytest.fixture
def lively_vlm(make_vlm):
    """lively_vlm(**changes): make_vlm whose logits and answers vary, as those of a trained model do."""

    def make(seed: int = 3, **changes):
        model = make_vlm(seed=seed, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and not name.startswith("vision_encoder"):
                    parameter.mul_(8 if "proj" in name else 30 if "embed" in name else 1)
        return model

    return make


@pytest.fixture
def weight(tmp_path, lively_vlm):
    path = tmp_path / "tiny_vlm.safetensors"
    facts = {
        "stage": "sft_vlm",
        "step": "7",
        "stage_config": json.dumps({"data_path": "/somewhere/sft.jsonl", "epochs": 2}),
    }
    save_weights(lively_vlm(), path, facts)
    return path


def options_of(weight, format_name: str, output, *further: object):
    return parse_arguments(["--weight", str(weight), "--to", format_name, "--output", str(output), *map(str, further)])


@pytest.mark.parametrize("format_name", sorted(FORMATS.keys() - {"minimind3v", "gguf", "onnx"}))
def test_whole_conversion_with_its_proof(weight, format_name, tmp_path, monkeypatch):
    if format_name in ("llm", "minimind"):  # two fresh processes are enough: each costs seconds
        prove_here(monkeypatch)
    output = tmp_path / "out" / format_name
    manifest = convert(options_of(weight, format_name, output))
    assert 0 <= manifest["largest_logit_difference"] <= BAR
    assert broken_files(output) == []
    assert json.loads((output / MANIFEST).read_text())["format"] == format_name
    names = {path.name for path in output.iterdir()}
    assert any(name.endswith(".py") for name in names) == (format_name == "transformers")
    assert "README.md" in names and "tokenizer.json" in names and "chat_template.jinja" in names
    for path in output.iterdir():
        if path.suffix in (".json", ".md", ".py", ".jinja"):
            assert str(tmp_path) not in path.read_text() and str(ROOT) not in path.read_text(), path
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card and "| data path | sft.jsonl |" in card and "| steps | 7 |" in card


@pytest.mark.parametrize("changes", [MOE, {**MOE, "num_experts_per_tok": 1}, {"rope_parameters": YARN}], ids=str)
@pytest.mark.parametrize("format_name", ["transformers", "llava", "llm"])
def test_other_architectures(lively_vlm, format_name, changes, tmp_path):
    model = lively_vlm(**changes)
    found = differences(
        bare_decoder(model) if format_name == "llm" else model,
        export(model, format_name, tmp_path / "folder"),
        tmp_path / "reference",
    )
    assert found["largest_logit_difference"] <= BAR
    assert found["texts"] == found["expected"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_only_what_was_rounded(lively_vlm, dtype, tmp_path):
    model = lively_vlm()
    found = differences(model, export(model, "llava", tmp_path / "llava", dtype=dtype), tmp_path / "reference")
    assert found["largest_logit_difference"] <= BAR


@pytest.mark.parametrize("what", ["perturbed", "misplaced picture"])
def test_wrong_conversion_is_refused(weight, tmp_path, monkeypatch, what):
    def wrong(source, folder):
        exported = FORMATS_BEFORE["llava"](source, folder)
        if what == "perturbed":
            tensors = load_file(folder / "model.safetensors")
            next(v for n, v in tensors.items() if "linear_1.bias" in n)[3] += 1
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        else:
            path = folder / "preprocessor_config.json"
            path.write_text(path.read_text().replace('"do_normalize": true', '"do_normalize": false'))
        return exported

    FORMATS_BEFORE = dict(FORMATS)
    monkeypatch.setitem(FORMATS, "llava", wrong)
    prove_here(monkeypatch)
    with pytest.raises(ValueError, match="logits differ by"):
        convert(options_of(weight, "llava", tmp_path / "out" / "model"))
    assert list((tmp_path / "out").iterdir()) == []


def test_no_vision_names_its_tower(weight, tower_folder, tmp_path, monkeypatch, make_vlm):
    prove_here(monkeypatch)
    output = tmp_path / "blind"
    manifest = convert(options_of(weight, "transformers", output, "--no_vision"))
    assert manifest["largest_logit_difference"] <= BAR
    assert manifest["vision_tower"]["included"] is False and manifest["vision_tower"]["name"] == tower_folder.name
    assert not any(name.startswith("vision_encoder") for name in load_file(output / "model.safetensors"))
    assert (output / "tower_folder.py").exists()
    load = AutoModelForImageTextToText.from_pretrained
    with pytest.raises(ValueError, match="comes without its vision tower"):
        load(output, trust_remote_code=True)
    other = tmp_path / "other"
    make_vlm(seed=9).vision_encoder.save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is another tower"):
        load(output, trust_remote_code=True, vision_model=other)


@pytest.mark.parametrize("format_name", ["transformers", "llava"])
def test_batch_padded_on_the_left_answers_as_one_by_one(lively_vlm, format_name, tmp_path):
    model = lively_vlm()
    found = differences(model, export(model, format_name, tmp_path / "folder"), tmp_path / "reference")
    own_code = format_name == "transformers"
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "folder", trust_remote_code=own_code).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "folder", trust_remote_code=own_code)
    conversations = export_proof.prompts(True, tmp_path / "reference")
    padding = {"padding": True} if not own_code else {}
    if "processor_kwargs" in signature(processor.apply_chat_template).parameters:  # not yet in transformers 5.4
        padding = {"processor_kwargs": padding}
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
    )
    assert (inputs["attention_mask"] == 0).any()
    output = other.generate(**inputs, max_new_tokens=export_proof.MAX_NEW_TOKENS, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == found["expected"]


def test_minimind_pth_there_and_back(lively_vlm, tower_folder, tmp_path):
    model = lively_vlm(num_attention_heads=8, num_key_value_heads=2)
    folder = export(model, "minimind", tmp_path / "folder")
    tensors = torch.load(folder / "tiny.pth", weights_only=True)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"} <= set(tensors)
    assert not any(name.startswith("vision_encoder") for name in tensors)
    back = load_model(folder / "tiny.pth", tower_folder)
    assert back.config.num_attention_heads == 8 and back.config.num_key_value_heads == 2
    for name, value in back.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(value, expected if name.startswith("vision_encoder") else expected.half().float()), name


def test_minimind_pth_with_all_of_clip_inside(lively_vlm, tmp_path):
    """MiniMind2-V's vision_encoder is a whole CLIPModel; a file that holds it is read like one that does not."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    clip.save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = build_vlm(sizes, tmp_path / "clip").eval()
    tensors = {n: v.half() for n, v in model.state_dict().items() if not n.startswith("vision_encoder")}
    torch.save(tensors | {f"vision_encoder.{n}": v for n, v in clip.state_dict().items()}, tmp_path / "old.pth")
    back = load_model(tmp_path / "old.pth", tmp_path / "clip")
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(back.encode_pictures(pixels), model.encode_pictures(pixels))
    with torch.no_grad():
        theirs = clip.vision_model(pixels.float() / 255 - 0.5).last_hidden_state[:, 1:]
        assert torch.equal(back.vision_encoder(pixels.float() / 255 - 0.5).last_hidden_state[:, 1:], theirs)


@pytest.mark.parametrize("changes", [DENSE, MOE], ids=str)
def test_llava_files_are_named_as_published_ones(lively_vlm, changes, tmp_path):
    """What vLLM and others read by these names, never mind which version of transformers wrote them."""
    folder = export(lively_vlm(**changes), "llava", tmp_path / "llava")
    names, layer = set(load_file(folder / "model.safetensors")), "language_model.model.layers.0"
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        f"{layer}.self_attn.q_proj.weight",
        f"{layer}.mlp.experts.3.gate_proj.weight" if changes else f"{layer}.mlp.gate_proj.weight",
    } <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["projector_hidden_act"] == "linear" and config["text_config"]["rope_theta"] == 1e6
    assert config["text_config"]["model_type"] == ("qwen2_moe" if changes else "llama")


def test_image_token_is_its_own_and_at_stays_text(lively_vlm, tmp_path):
    folder = export(lively_vlm(), "llava", tmp_path / "llava")
    draw_picture(PICTURES["wide.png"], 1).save(tmp_path / "a.png")
    processor = AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "text", "text": "@@ "},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "@"},
    ]
    ids = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    ids = torch.as_tensor(ids).flatten().tolist()
    assert ids.count(34) == 3 and ids.count(6400) == 4
    ours = VLMProcessor(load_tokenizer(), 4, 32).render([{"role": "user", "content": content}])
    assert [34 if i == 6400 else i for i in ids] == ours.input_ids.tolist()
    pixels = processor(images=open_picture(tmp_path / "a.png"), text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (32, 32)  # squeezed, nothing cut off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "llava", "--weight", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--to", "llava", "--score", "nowhere.json"], "nowhere.json is no report"),
        (["--to", "llava", "--tokenizer", "nowhere"], "nowhere holds no tokenizer.json"),
        (["--to", "llava", "--vision_model", "nowhere"], "nowhere holds no vision tower"),
    ],
)
def test_mistakes_get_a_sentence(weight, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert_vlm", "--weight", str(weight), "--output", str(tmp_path / "o"), *arguments]
    )
    with pytest.raises(SystemExit, match=re.escape(message)):
        convert_vlm.main()
    assert not (tmp_path / "o").exists()


def test_formats_refuse_what_they_cannot_hold(lively_vlm, tmp_path):
    decoder = bare_decoder(lively_vlm())
    for name in ("transformers", "llava"):
        with pytest.raises(ValueError, match="--to llm takes them"):
            export(decoder, name, tmp_path / name)
    homeless = lively_vlm()
    homeless.config.vision_source = None
    for name, settings in (("transformers", {"with_vision": False}), ("minimind", {})):
        with pytest.raises(ValueError, match="it cannot be left out"):
            export(homeless, name, tmp_path / f"homeless_{name}", **settings)
    with pytest.raises(ValueError, match="cannot tell rope_parameters"):
        export(lively_vlm(rope_parameters=YARN), "minimind", tmp_path / "yarn")
    with pytest.raises(ValueError, match="cannot tell num_experts_per_tok 1"):
        export(lively_vlm(use_moe=True, num_experts_per_tok=1), "minimind", tmp_path / "one")


def test_bare_decoder_comes_and_goes(lively_vlm, tmp_path, monkeypatch):
    prove_here(monkeypatch)
    save_weights(bare_decoder(lively_vlm(use_moe=True)), tmp_path / "llm.safetensors")
    for name in ("llm", "minimind"):
        manifest = convert(options_of(tmp_path / "llm.safetensors", name, tmp_path / name))
        assert manifest["vision_tower"] is None and manifest["largest_logit_difference"] <= BAR
