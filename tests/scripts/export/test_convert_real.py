"""Stock folders of every decoder, tower and projector that transformers has; the rest goes with our code."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from helpers.exports import bare_decoder, differences, export, fresh_differences, make_seeing, refer
from helpers.foreign_base import FAMILIES, write_base
from model.messages import UserError
from model.tokenizer_files import picture_token, read_tokenizer, special_ids

BAR = 1e-5  # largest difference of an fp32 logit
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
SHARED = {"shared_expert_intermediate_size": 48, "shared_expert_gate": True}
DECODERS = {  # by the class that holds them, as config.json calls it
    "llama": {"tie_word_embeddings": False, **BIASES},
    "qwen2": {"qkv_bias": True, "rms_norm_eps": 1e-6},
    "qwen2_moe": {"use_moe": True, "qkv_bias": True, "norm_topk_prob": False, **SHARED},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "num_experts_per_tok": 1, "norm_topk_prob": True,
                  "shared_expert_intermediate_size": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_every_stock_decoder(kind, tmp_path):
    model = make_seeing("siglip_vision_model", projector="mlp", **DECODERS[kind])
    folder = export(model, "llava", tmp_path / "llava")
    facts = json.loads((folder / "config.json").read_text())
    assert facts["text_config"]["model_type"] == kind and facts["vision_config"]["model_type"] == "siglip_vision_model"
    found = differences(model, folder, tmp_path / "reference")
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]


@pytest.mark.parametrize("kind", DECODERS)
def test_every_stock_decoder_alone(kind, tmp_path):
    model = bare_decoder(make_seeing(**DECODERS[kind]))
    folder = export(model, "llm", tmp_path / "llm")
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    found = differences(model, folder, tmp_path / "reference")
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]


@pytest.mark.parametrize(
    ("tower", "projector"),
    [("clip_vision_model", "linear"), ("clip_vision_model", "mlp"), ("siglip_vision_model", "linear")],
)
def test_every_stock_sight(tower, projector, tmp_path):
    model = make_seeing(tower, projector=projector)
    found = differences(model, export(model, "llava", tmp_path / "llava"), tmp_path / "reference")
    assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]


def test_mlp_goes_out_unscaled(tmp_path):
    """So that others can train the folder on: gradients through the scaled linear projector are of the order 1e12."""
    model = make_seeing("siglip_vision_model", projector="mlp")
    folder = export(model, "llava", tmp_path / "llava")
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    projector = stock.model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, model.vision_proj.linear_1.weight)
    assert torch.equal(projector.linear_2.bias, model.vision_proj.linear_2.bias)
    assert AutoConfig.from_pretrained(folder).projector_hidden_act == "gelu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_only_what_was_rounded(dtype, tmp_path):
    model = make_seeing("siglip_vision_model", projector="mlp", qk_norm=True)
    folder = export(model, "llava", tmp_path / "llava", dtype=dtype)
    assert differences(model, folder, tmp_path / "reference")["largest_logit_difference"] <= BAR


OWN = {
    "folded": ("clip_vision_model", {"image_tokens": 4}),
    "norm_mlp": ("siglip_vision_model", {"projector": "norm_mlp", "qk_norm": True}),
    "before the norm": ("siglip_vision_model", {"projector": "mlp", "image_tokens": 8}),
    "dinov2": ("dinov2", {}),
    "registers": ("dinov2_with_registers", {"projector": "mlp"}),
    "efficientnet": ("efficientnet_lite", {"projector": "mlp", "use_moe": True}),
}


def test_the_rest_goes_out_with_its_code(tmp_path):
    """Every kind of tower, in one process that has nothing of this project; and a stock folder beside them."""
    references = {}
    for name, (tower, changes) in {**OWN, "stock": ("siglip_vision_model", {"projector": "mlp"})}.items():
        model = make_seeing(tower, **changes)
        folder = export(model, "llava" if name == "stock" else "transformers", tmp_path / name)
        references[folder] = refer(model, tmp_path / f"{name} reference")
    found = fresh_differences(references, tmp_path)
    for name, report in found.items():
        assert report["largest_logit_difference"] <= BAR, name
        assert report["texts"] == report["expected"], name
    assert len(found) == len(OWN) + 1


@pytest.mark.parametrize(
    ("tower", "changes", "reason"),
    [
        ("dinov2", {}, "a dinov2 tower"),
        ("efficientnet_lite", {}, "an? efficientnet_lite tower"),
        ("siglip_vision_model", {"projector": "norm_mlp"}, "the projector norm_mlp"),
        ("clip_vision_model", {"image_tokens": 4}, "patches folded into 4 tokens"),
        ("clip_vision_model", {"qkv_bias": True, "mlp_bias": True}, "qwen2 has no mlp_bias"),
        ("clip_vision_model", {"use_moe": True, "qk_norm": True}, "qwen3_moe has no shared expert"),
    ],
)
def test_llava_refuses_what_it_cannot_hold(tower, changes, reason, tmp_path):
    model = make_seeing(tower, **changes)
    with pytest.raises(UserError, match=f"{reason}.*--to transformers"):
        export(model, "llava", tmp_path / "llava")
    folder = export(model, "transformers", tmp_path / "transformers")
    assert (folder / "modeling_minimind_vlm.py").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_and_template_of_a_base_go_along(family, tmp_path):
    tokenizer = read_tokenizer(write_base(tmp_path / "base", family))
    sizes = {"vocab_size": 448, "image_token_id": picture_token(tokenizer, 448), **special_ids(tokenizer)}
    model = make_seeing("siglip_vision_model", projector="mlp", **sizes)
    for format_name in ("llava", "transformers"):
        folder = export(model, format_name, tmp_path / format_name, tokenizer)
        found = differences(model, folder, tmp_path / "reference", tokenizer=tokenizer)
        assert found["largest_logit_difference"] <= BAR and found["texts"] == found["expected"]
    again = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert again.get_vocab().keys() - tokenizer.get_vocab().keys() == {"<image>"}
