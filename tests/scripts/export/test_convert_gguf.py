"""What `--to gguf` refuses, and what it writes for Ollama; llama.cpp itself is asked in tests/engines."""

import sys

import pytest

from helpers.exports import make_seeing
from helpers.models import LLAMA3, make_decoder
from model.chat_format import ChatFormat
from model.messages import UserError
from scripts.convert_vlm import parse_arguments
from scripts.export.exported import Source
from scripts.export.gguf_folder import export_gguf, modelfile
from scripts.export.gguf_sight import check_sight
from scripts.export.gguf_text import architecture
from scripts.export.gguf_tokenizer import way_of_splitting

DEFAULT_MOE = {"use_moe": True}
QWEN3_MOE = {"use_moe": True, "qk_norm": True, "shared_expert_intermediate_size": 0}
GATED = {"use_moe": True, "shared_expert_gate": True, "qkv_bias": True, "norm_topk_prob": False}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
        ("bailingmoe", DEFAULT_MOE),
        ("qwen2moe", GATED),
        ("qwen3moe", QWEN3_MOE),
    ],
    ids=str,
)
def test_which_architecture_computes_a_decoder(name, changes):
    assert architecture(make_decoder(**changes).config) == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**QWEN3_MOE, "norm_topk_prob": False}, "qwen3moe has no experts whose weights do not sum to one"),
        ({**GATED, "norm_topk_prob": True}, "qwen2moe has no experts whose weights sum to one"),
        ({**GATED, "head_dim": 16}, "qwen2moe has no heads of 16"),
        ({**DEFAULT_MOE, "qkv_bias": True}, "bailingmoe has no qkv_bias"),
        ({**DEFAULT_MOE, "shared_expert_intermediate_size": 40}, "bailingmoe has no a shared expert of 40"),
        ({"qk_norm": True, "rope_parameters": LLAMA3}, "qwen3 has no Llama 3's RoPE"),
    ],
    ids=str,
)
def test_a_decoder_that_llama_cpp_lacks_is_refused_by_name(changes, reason):
    with pytest.raises(UserError, match=f"--to gguf: llama.cpp's {reason}.*--to llm"):
        architecture(make_decoder(**changes).config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tower": "dinov2"}, "a dinov2 tower"),
        ({"tower": "efficientnet_lite"}, "a efficientnet_lite tower"),
        ({"projector": "norm_mlp"}, "the projector norm_mlp"),
        ({"image_tokens": 4}, "patches folded into 4 tokens"),
    ],
    ids=str,
)
def test_a_sight_that_llama_cpp_lacks_is_refused_by_name(changes, reason):
    with pytest.raises(UserError, match=f"{reason}.*--to transformers"):
        check_sight(make_seeing(**changes).config)


def test_ways_of_splitting():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    apart = {"type": "Split", "pattern": {"Regex": "@"}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    assert way_of_splitting({"pre_tokenizer": byte_level}) == ("gpt-2", set())
    steps = {"type": "Sequence", "pretokenizers": [apart, byte_level]}
    assert way_of_splitting({"pre_tokenizer": steps}) == ("gpt-2", {"@"})
    assert len(steps["pretokenizers"]) == 2  # is the tokenizer's own
    steps = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    assert way_of_splitting({"pre_tokenizer": steps}) == ("smollm", set())
    for unknown in ({**byte_level, "add_prefix_space": True}, {"type": "Metaspace"}, None):
        with pytest.raises(UserError, match="splits texts in a way that has no name here.*gpt-2, smollm, qwen2"):
            way_of_splitting({"pre_tokenizer": unknown})


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_a_missing_package_is_named_with_its_cure(package, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{package}.*pip install -r requirements/gguf.txt"):
        export_gguf(Source(make_decoder(), tokenizer, "tiny"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_only_gguf_has(capsys):
    wanted = ["--weight", "w", "--output", "o", "--dtype", "q8_0", "--to"]
    assert parse_arguments([*wanted, "gguf"]).dtype == "q8_0"
    with pytest.raises(SystemExit):
        parse_arguments([*wanted, "llava"])
    assert "--dtype q8_0 goes with --to gguf: elsewhere take float32, float16, bfloat16" in capsys.readouterr().err


def test_modelfile_writes_the_turns_of_the_template(tokenizer):
    text = modelfile(ChatFormat.of(tokenizer), sees=True)
    assert text.startswith('FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """{{ range .Messages }}')
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert '{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"' in text
    begun = ChatFormat("<s>", (("user", "Q: "), ("assistant", "A: ")), (("user", "\n"), ("assistant", "")), "</s>")
    text = modelfile(begun, sees=False)
    assert "mmproj" not in text and '{{ if ne (index .Messages 0).Role "system" }}<s>{{ end }}' in text
    assert 'A: {{ .Content }}</s>{{ end }}{{ end }}A: """' in text
