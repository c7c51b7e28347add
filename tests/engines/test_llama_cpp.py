"""llama.cpp itself on tiny models: it answers what our model answers, and what it could not is found out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements/gguf.txt")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install -r requirements/gguf.txt")

from gguf import GGMLQuantizationType, GGUFReader  # noqa: E402
from gguf.quants import dequantize  # noqa: E402

from helpers.data import make_picture  # noqa: E402
from helpers.exports import bare_decoder, make_seeing  # noqa: E402
from helpers.foreign_base import write_base  # noqa: E402
from helpers.models import LLAMA3, YARN  # noqa: E402
from helpers.repository import ROOT  # noqa: E402
from model.inference.answerer import Answerer, Options, user_turn  # noqa: E402
from model.messages import UserError  # noqa: E402
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer, read_tokenizer  # noqa: E402
from model.weights import load_model, save_weights  # noqa: E402
from scripts.convert_vlm import convert, parse_arguments  # noqa: E402
from scripts.export import gguf_proof  # noqa: E402
from scripts.export.exported import Source  # noqa: E402
from scripts.export.gguf_folder import export_gguf  # noqa: E402
from scripts.export.gguf_proof import AS_TRAINED, CLASS_LAST, Comparison, examine, prove_gguf, write_references  # noqa: E402
from scripts.export.gguf_sight import _projector_tensors  # noqa: E402
from scripts.export.llama_cpp import MODEL, ROLLED, SIGHT, LlamaCpp, Settings  # noqa: E402

QWEN3_MOE = {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0, "head_dim": 16}
GATED = {"use_moe": True, "shared_expert_gate": True, "qkv_bias": True, "norm_topk_prob": False}
SEEING = {
    "llama": {},
    "llama with biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama's YaRN": {"rope_parameters": YARN},
    "llama 3's RoPE": {"rope_parameters": LLAMA3, "head_dim": 16},
    "qwen2, mlp": {"qkv_bias": True, "projector": "mlp"},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "ours with experts": {"use_moe": True},
    "qwen2_moe": GATED,
    "qwen3_moe": QWEN3_MOE,
    "siglip": {"tower": "siglip_vision_model"},
}


@pytest.fixture(scope="module")
def seeing():
    return make_seeing(hidden_size=64)


@pytest.fixture(scope="module")
def folder(seeing, tmp_path_factory) -> Path:
    """In float32, with the file that fits this llama.cpp."""
    folder = tmp_path_factory.mktemp("gguf")
    export_gguf(Source(seeing, load_tokenizer(), "tiny"), folder)
    reference = tmp_path_factory.mktemp("reference")
    write_references(seeing, load_tokenizer(), reference, sees=True)
    examine(folder, reference)
    return folder


def examined(model, tmp_path, tokenizer=None, sees: bool = True, **settings) -> dict:
    """What the proof finds of a model in memory."""
    folder, reference = tmp_path / "folder", tmp_path / "reference"
    folder.mkdir(), reference.mkdir()
    tokenizer = tokenizer or load_tokenizer()
    export_gguf(Source(model, tokenizer, "tiny", **settings), folder)
    write_references(model, tokenizer, reference, sees)
    return examine(folder, reference)


@pytest.mark.parametrize("name", SEEING)
def test_it_answers_what_ours_answers(name, tmp_path):
    found = examined(make_seeing(**SEEING[name]), tmp_path)
    assert found["answers"] == found["same_or_tie"] == 20 and found["same_texts"] >= 19
    assert found["difference"] < 0.01 and not found["other_tokens"]
    assert len({text for text, _ in found["texts"]}) > 3  # they say something
    assert sorted(path.name for path in (tmp_path / "folder").glob("*.gguf")) == [SIGHT, MODEL]
    if name == "siglip":  # which has no class token to misplace
        assert found["way"] is None and found["as_trained"] == 20
    else:
        assert found["as_trained"] < 20 or found["way"] == AS_TRAINED


@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_a_base_of_others_with_its_tokenizer(family, tmp_path):
    base = write_base(tmp_path / "base", family)
    found = examined(load_model(base), tmp_path, read_tokenizer(base), sees=False)
    assert found["answers"] == found["same_or_tie"] and found["difference"] < 1e-3 and not found["other_tokens"]


def test_a_tokenizer_that_it_lacks_is_refused(tmp_path):
    base = write_base(tmp_path / "base", "tinyllama")
    with pytest.raises(UserError, match="has no name here.*Metaspace"):
        export_gguf(Source(load_model(base), read_tokenizer(base), "tiny"), tmp_path)


@pytest.mark.parametrize("text", [
    "@" * 7, "a  @b", "@'s", "\n\n@\n\n", " @ @@  @", "me@here.org", "It's 1234567 cats\n\n\n  x", "１２３，你好！",
    "🙂👨‍👩‍👧★", "日本語 한국어 العربية é\u3000", "\t x\r\n ", "<|im_start|>user\nhi<|im_end|>",
])  # fmt: skip
def test_texts_are_cut_into_the_same_tokens(folder, text):
    assert LlamaCpp(folder).tokens(text) == load_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_files_hold_the_weights(seeing, folder):
    text, sight = (
        {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(folder / name).tensors}
        for name in (MODEL, SIGHT)
    )
    weights = {name: value.numpy() for name, value in seeing.state_dict().items()}
    assert set(text) == {"token_embd.weight", "output_norm.weight"} | {
        f"blk.{layer}.{name}.weight" for layer in range(2) for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    }  # fmt: skip
    np.testing.assert_array_equal(text["token_embd.weight"], weights["model.embed_tokens.weight"])
    ours = weights["model.layers.1.self_attn.k_proj.weight"].reshape(2, 2, 8, 64)  # heads, halves, pairs, width
    np.testing.assert_array_equal(text["blk.1.attn_k.weight"].reshape(2, 8, 2, 64), ours.swapaxes(1, 2))
    assert "v.post_ln.weight" not in sight and sight["mm.0.weight"].shape == (128, 16)
    up = weights["vision_encoder.encoder.layers.1.mlp.fc1.weight"]
    np.testing.assert_array_equal(sight["v.blk.1.ffn_up.weight"], up)
    facts = {name: field.contents() for name, field in GGUFReader(folder / SIGHT).fields.items()}
    assert facts["clip.vision.feature_layer"] == [2] and facts["clip.vision.image_size"] == 32
    assert "clip.use_gelu" not in facts  # quick GELU
    facts = GGUFReader(folder / MODEL).fields
    assert facts["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert facts["tokenizer.ggml.add_bos_token"].contents() is False
    assert "<|im_start|>" in facts["tokenizer.chat_template"].contents()


@pytest.mark.parametrize(("settings", "kind"), [
    ({"dtype": torch.float16}, "F16"), ({"dtype": torch.bfloat16}, "BF16"), ({"quantized": "q8_0"}, "Q8_0"),
])  # fmt: skip
def test_other_numbers(seeing, settings, kind, tmp_path):
    model = make_seeing(hidden_size=64)  # is rounded in place
    found = examined(model, tmp_path, **settings)
    assert found["same_first"] >= (16 if kind == "Q8_0" else 19)  # random weights decide by a hair
    types = {t.name: t.tensor_type for name in (MODEL, SIGHT) for t in GGUFReader(tmp_path / "folder" / name).tensors}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == GGMLQuantizationType[kind]
    full = ("blk.0.attn_norm.weight", "mm.0.weight", "v.patch_embd.weight", "v.position_embd.weight", "v.class_embd")
    assert {types[name] for name in full} == {GGMLQuantizationType.F32}
    narrow = "F16" if kind == "Q8_0" else kind  # a tower 16 wide has no blocks of 32
    assert types["v.blk.0.attn_q.weight"] == GGMLQuantizationType[narrow]


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    model = make_seeing()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="blk.0.ffn_up.weight holds inf.*--dtype bfloat16"):
        export_gguf(Source(model, load_tokenizer(), "tiny", dtype=torch.float16), tmp_path)


def test_one_layer_is_exact_as_two_with_a_gelu(seeing):
    """Beside a table of half precision up to 10, as llama.cpp has it on a CPU."""
    tensors = {name: value.detach().numpy() for name, value in _projector_tensors(seeing.vision_proj).items()}
    patches = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    x = patches @ tensors["mm.0.weight"].T + tensors["mm.0.bias"]
    rounded = torch.nn.functional.gelu(torch.from_numpy(x).half().float(), approximate="tanh").half().float().numpy()
    x = np.where(x >= 10, x, np.where(x <= -10, 0, rounded))
    ours = seeing.vision_proj(torch.from_numpy(patches)[None])[0].detach().numpy()
    np.testing.assert_allclose(x @ tensors["mm.2.weight"].T + tensors["mm.2.bias"], ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [AS_TRAINED, CLASS_LAST])
def test_the_file_that_fits_the_engine_is_kept(seeing, way, tmp_path, monkeypatch):
    """Whichever llama.cpp is at hand: that it misplaces the class token is seen, and never assumed."""
    export_gguf(Source(seeing, load_tokenizer(), "tiny"), tmp_path)
    write_references(seeing, load_tokenizer(), tmp_path, sees=True)
    wanted = (tmp_path / {AS_TRAINED: SIGHT, CLASS_LAST: ROLLED}[way]).read_bytes()
    monkeypatch.setattr(gguf_proof, "compare", lambda folder, reference, one: Comparison(one, [], [], [], one != way))
    monkeypatch.setattr(gguf_proof, "zip", lambda *lists, strict: [], raising=False)
    assert examine(tmp_path, tmp_path)["way"] == way
    assert (tmp_path / SIGHT).read_bytes() == wanted and not (tmp_path / ROLLED).exists()


def test_a_blind_model_is_found_out(seeing, folder, tmp_path):
    """As the scaling that other engines need would have made it."""
    write_references(seeing, load_tokenizer(), tmp_path, sees=True)
    (tmp_path / MODEL).write_bytes((folder / MODEL).read_bytes())
    for name in (SIGHT, ROLLED):
        (tmp_path / name).write_bytes((folder / SIGHT).read_bytes())
        for tensor in GGUFReader(tmp_path / name, "r+").tensors:
            if tensor.name == "mm.2.weight":
                tensor.data[:] = 0
    with pytest.raises(UserError, match="llama.cpp's log probabilities differ by"):
        prove_gguf(tmp_path, tmp_path)
    (tmp_path / MODEL).write_bytes(b"GGUF, and nothing more")
    with pytest.raises(UserError, match="llama.cpp does not load the converted folder"):
        prove_gguf(tmp_path, tmp_path)


def test_whole_conversion(seeing, tmp_path):
    save_weights(seeing, tmp_path / "tiny.safetensors")
    output = tmp_path / "out"
    wanted = ["--weight", tmp_path / "tiny.safetensors", "--to", "gguf", "--output", output]
    manifest = convert(parse_arguments(list(map(str, wanted))))
    assert {path.name for path in output.iterdir()} == {MODEL, SIGHT, "Modelfile", "README.md", "conversion.json"}
    assert "llama.cpp (xllamacpp" in manifest["proved"] and manifest["llama_cpp"]["answers"] == 20
    assert manifest["llama_cpp"]["position_embd"] in ("rolled by -1", "as trained")
    assert json.loads((output / "conversion.json").read_text())["llama_cpp"] == manifest["llama_cpp"]
    card = (output / "README.md").read_text()
    for words in ("library_name: gguf", r"-p $'\nWhat is it?'", "llama-mtmd-cli -m model.gguf --mmproj",
                  "ollama create tiny", "squeezed to 32 x 32", 'params.mmproj.path = "mmproj.gguf"'):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card


def test_a_decoder_alone(tmp_path):
    model = bare_decoder(make_seeing())
    found = examined(model, tmp_path, sees=False)
    assert found["same_or_tie"] == found["answers"] and found["way"] is None
    engine = LlamaCpp(tmp_path / "folder")
    assert not engine.sees and not (tmp_path / "folder" / SIGHT).exists()


def test_several_at_once_and_pictures_that_are_not_square(seeing, folder):
    tokenizer = load_tokenizer()
    answerer = Answerer(seeing, processor=VLMProcessor.for_config(seeing.config, tokenizer))
    wide = make_picture(1).resize((90, 30))
    asked = [([user_turn(f"What is {word}?", 1)], [wide]) for word in ("this", "that", "it", "there")]
    engine = LlamaCpp(folder, Settings(rows=4, exact=True))
    replies = engine.ask_all(asked, max_new_tokens=8)
    alone = [engine.ask(*question, max_new_tokens=8) for question in asked]
    assert [reply.text for reply in replies] == [reply.text for reply in alone]
    prompts = [answerer.prompt(*question) for question in asked]
    assert [reply.prompt_tokens for reply in replies] == [len(prompt.ids) for prompt in prompts]
    fresh = engine.ask(*asked[0], max_new_tokens=8, cache_prompt=False)
    assert fresh.read_tokens == fresh.prompt_tokens and fresh.prompt_seconds > 0 and 1 <= fresh.new_tokens <= 8
    padded = LlamaCpp(folder, replace(Settings(exact=True), squeeze=False)).ask(*asked[0], 8, top_logprobs=5)
    squeezed = engine.ask(*asked[0], 8, top_logprobs=5)
    assert padded.first != squeezed.first
    assert answerer.batch(prompts[:1], Options(max_new_tokens=1))[0].new_tokens == 1


def test_one_that_is_never_asked_ends(folder):
    """In a process of its own: what would not end would hold up all tests."""
    code = "import sys; from scripts.export.llama_cpp import LlamaCpp\nfor _ in range(20): LlamaCpp(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, timeout=100)


def test_what_is_no_folder_of_this_kind(tmp_path):
    with pytest.raises(UserError, match="holds no model.gguf: make it with scripts/convert_vlm.py --to gguf"):
        LlamaCpp(tmp_path)
    (tmp_path / MODEL).write_bytes(b"nothing")
    with pytest.raises(UserError, match="llama.cpp does not load"):
        LlamaCpp(tmp_path)
