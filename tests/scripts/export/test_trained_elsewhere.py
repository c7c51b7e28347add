"""A stock folder that others train: its gradients are sound, its masks are our labels, and it comes home again."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.exports import differences, export, make_seeing, prove_here
from helpers.foreign_base import write_base
from model.inference.llava_projector import SMALL
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.processing import IGNORE_INDEX, VLMProcessor
from model.tokenizer_files import load_tokenizer, picture_token, read_tokenizer, special_ids
from model.weights import build_vlm, load_model, save_weights
from scripts import convert_vlm
from scripts.export import proof
from scripts.export.llava_home import read_llava
from scripts.export.training_proof import complaint

BAR = 1e-5  # largest difference of an fp32 logit


@pytest.fixture
def stock(tmp_path):
    """stock(model) -> (folder, the model that transformers loads from it)."""

    def make(model: MiniMindVLM, name: str = "llava", **settings):
        folder = export(model, "llava", tmp_path / name, **settings)
        return folder, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    return make


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_three_steps_make_no_answer_less_likely(projector, stock, tmp_path):
    model = make_seeing(projector=projector)
    folder, _ = stock(model)
    trained = differences(model, folder, tmp_path / "reference")["trained"]
    assert complaint(trained) == "" and sum(trained["after"]) < sum(trained["before"])
    norms = trained["gradient_norms"]
    assert set(norms) == {"tower", "projector", "decoder"}
    assert max(norms.values()) < 100 * min(norms.values())


def test_a_scaled_projector_cannot_be_trained_and_says_so(stock, tmp_path):
    model = make_seeing()
    folder, loaded = stock(model, engine="vllm")
    assert loaded.config.projector_hidden_act == "gelu"
    assert loaded.model.multi_modal_projector.linear_2.weight.max() == 2 / SMALL
    found = differences(model, folder, tmp_path / "reference")
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]
    assert "cannot" not in complaint(found["trained"]) and "projector" in complaint(found["trained"])
    assert found["trained"]["gradient_norms"]["projector"] > 1e9


def options(weight, *further: object):
    return convert_vlm.parse_arguments(["--weight", str(weight), *map(str, further)])


@pytest.fixture
def weight(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_weights(make_seeing(), path)
    return path


def test_the_card_says_for_inference_only(weight, tmp_path, monkeypatch):
    prove_here(monkeypatch)
    for_vllm = tmp_path / "vllm"
    manifest = convert_vlm.convert(options(weight, "--to", "llava", "--engine", "vllm", "--output", for_vllm))
    assert "For inference only" in (for_vllm / "README.md").read_text() and "trained" not in manifest
    plain = tmp_path / "plain"
    manifest = convert_vlm.convert(options(weight, "--to", "llava", "--output", plain))
    assert "For inference only" not in (plain / "README.md").read_text()
    assert len(manifest["trained"]["after"]) == 4
    with pytest.raises(UserError, match="float16 has no room"):
        convert_vlm.convert(
            options(weight, "--to", "llava", "--engine", "mlx", "--dtype", "float16", "--output", plain)
        )


def test_a_folder_that_training_would_ruin_is_refused(weight, tmp_path, monkeypatch):
    """The check itself: scaled as for vLLM, and said to be trainable."""
    export_llava = convert_vlm.FORMATS["llava"]

    def praised(source, folder):
        return replace(export_llava(replace(source, engine="vllm"), folder), trains=True)

    monkeypatch.setitem(convert_vlm.FORMATS, "llava", praised)
    prove_here(monkeypatch)
    with pytest.raises(UserError, match="cannot be trained on: 3 steps of AdamW"):
        convert_vlm.convert(options(weight, "--to", "llava", "--output", tmp_path / "llava"))
    assert not (tmp_path / "llava").exists()
    convert_vlm.convert(options(weight, "--to", "llava", "--output", tmp_path / "llava", "--no_training_proof"))


WORDS = st.text("ab \n图?@<>", min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(st.integers(0, 2), st.booleans(), WORDS, WORDS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def stock_processor(tmp_path_factory):
    folder = export(make_seeing(), "llava", tmp_path_factory.mktemp("masks") / "llava")
    return AutoProcessor.from_pretrained(folder)


@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_assistant_masks_are_our_labels(stock_processor, turns):
    """Random conversations: pictures before or behind the words, or none."""
    picture, talk, plain = proof.draw_picture((40, 30), 1), [], []
    for pictures, behind, question, answer in turns:
        shown = [{"type": "image", "image": picture}] * pictures
        text = [{"type": "text", "text": question}]
        talk.append({"role": "user", "content": text + shown if behind else shown + text})
        plain.append({"role": "user", "content": [
            {"type": "image"} if part["type"] == "image" else part for part in talk[-1]["content"]
        ]})  # fmt: skip
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        talk.append(said)
        plain.append(said)
    found = stock_processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ours = VLMProcessor(load_tokenizer(), image_tokens=16, image_size=32).render(plain)
    mask, labels = torch.as_tensor(found["assistant_masks"])[0].bool(), torch.from_numpy(ours.labels)
    assert torch.equal(mask, labels != IGNORE_INDEX)
    assert found["input_ids"][0][mask].tolist() == labels[mask].tolist()


def trained_by_stock_code(loaded, folder, processor_of) -> None:
    """Weights that moved, saved by transformers."""
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    loaded.save_pretrained(folder)
    AutoProcessor.from_pretrained(processor_of).save_pretrained(folder)


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("clip_vision_model", {}),
        ("clip_vision_model", {"projector": "mlp", "use_moe": True}),
        ("siglip_vision_model", {"projector": "mlp", "qk_norm": True, "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_comes_home_with_the_same_logits(tower, changes, stock, tmp_path, monkeypatch):
    prove_here(monkeypatch)
    model = make_seeing(tower, **changes)
    folder, loaded = stock(model)
    trained_by_stock_code(loaded, tmp_path / "trained", folder)
    home = tmp_path / "home.safetensors"
    found = convert_vlm.come_home(options(tmp_path / "trained", "--from", "llava", "--output", home))
    assert found["largest_logit_difference"] <= BAR
    again = load_model(home)
    assert again.config.projector == changes.get("projector", "linear")
    assert again.config.vocab_size == model.config.vocab_size
    assert again.config.image_token_id == model.config.image_token_id
    assert read_tokenizer(home).get_vocab() == load_tokenizer().get_vocab()
    # and out again, under the names of published files, whatever those of the trained folder were
    manifest = convert_vlm.convert(
        options(tmp_path / "trained", "--from", "llava", "--to", "llava", "--output", tmp_path / "out")
    )
    assert manifest["largest_logit_difference"] <= BAR
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "out/model.safetensors").keys()


def test_names_as_transformers_writes_them_too(stock, tmp_path):
    """5.24 leaves `vision_model.` out where a model was not loaded from a file that has it."""
    folder, _ = stock(make_seeing())
    before, _ = read_llava(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        renamed["model." + name.replace("language_model.model.", "language_model.")] = value
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    after, _ = read_llava(folder)
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_home_is_where_it_left(stock, tmp_path):
    """Untrained, every tensor comes back to the bit, also from the scaled form."""
    model = make_seeing()
    for engine in ("transformers", "vllm"):
        folder, _ = stock(model, engine, engine=engine)
        home, _ = read_llava(folder)
        assert home.config.to_dict() == {**model.config.to_dict(), "vision_config": home.config.vision_config}
        assert all(torch.equal(value, home.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_other_bases_keep_their_words(family, stock, tmp_path):
    base = write_base(tmp_path / "base", family)
    tokenizer = read_tokenizer(base)
    rows = max(tokenizer.get_vocab().values()) + 1
    token = picture_token(tokenizer, rows)
    sizes = {"vocab_size": max(rows, token + 1), "image_token_id": token, **special_ids(tokenizer)}
    model = make_seeing(**sizes)
    folder, _ = stock(model, tokenizer=tokenizer)
    home, words = read_llava(folder)
    assert home.config.image_token_id == token and words.get_vocab() == tokenizer.get_vocab()


def test_a_tower_that_did_not_move_is_named(tower_folder, stock, tmp_path):
    model = build_vlm({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, tower_folder).eval()
    folder, _ = stock(model)
    home, _ = read_llava(folder, str(tower_folder))
    assert home.config.vision_sha256 == model.config.vision_sha256
    assert read_llava(folder)[0].config.vision_source is None  # its name alone leads nowhere: it stays with the model
    with torch.no_grad():
        next(model.vision_encoder.parameters()).add_(1)
    moved, _ = stock(model, "moved")
    with pytest.raises(UserError, match="is not the tower that this folder holds"):
        read_llava(moved, str(tower_folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mllama"}, "and no Llava"),
        ({"vision_feature_layer": -2}, "layer -2 and not the last"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ({"projector_hidden_act": "relu"}, "'relu': this reads gelu and linear"),
    ],
    ids=str,
)
def test_another_llava_is_refused_by_name(change, said, stock):
    folder, _ = stock(make_seeing())
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | change))
    with pytest.raises(UserError, match=said):
        read_llava(folder)
