"""Which of transformers' own classes holds which decoder: there and back with the same logits, or refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from helpers.bases import BASES, save_base, some_ids
from helpers.models import enliven_all, make_decoder, make_ids
from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from model.weights import load_model
from scripts.export.formats import Source, export_llava, export_llm, export_minimind, export_minimind3v

QWEN3 = {"qk_norm": True, "head_dim": 16}
QWEN3_MOE = {**QWEN3, "use_moe": True, "shared_expert_intermediate_size": 0, "norm_topk_prob": False}
GATED = {"use_moe": True, "shared_expert_gate": True, "shared_expert_intermediate_size": 40, "qkv_bias": True}


def new_folder(parent, name: str = "exported"):
    folder = parent / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_a_base_goes_back_into_the_class_that_it_came_from(name, tmp_path):
    theirs, ids = save_base(name, tmp_path), some_ids()
    folder = new_folder(tmp_path)
    exported = export_llm(Source(load_model(tmp_path), load_tokenizer(), "tiny"), folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(theirs) and type(theirs).__name__ in exported.kind
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    assert again.config.eos_token_id == theirs.config.eos_token_id


@pytest.mark.parametrize("changes", [QWEN3, {"qkv_bias": True}, QWEN3_MOE, GATED], ids=str)
@torch.no_grad()
def test_llava_is_built_around_it(changes, make_vlm, tokenizer, tmp_path):
    model, ids = enliven_all(make_vlm(**changes)), make_ids(1, 20)
    export_llava(Source(model, tokenizer, "tiny"), tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours = model(ids).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(stock(input_ids=ids).logits[..., :6400], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_bias": True}, "llama has no qkv_bias False beside output_bias True"),
        ({"qkv_bias": True, "mlp_bias": True}, "beside output_bias False; qwen2 has no mlp_bias"),
        ({**QWEN3, "mlp_bias": True}, "qwen3 has no mlp_bias"),
        ({**QWEN3, "qkv_bias": True}, "qwen3 has no qkv_bias True beside output_bias False"),
        ({"use_moe": True, "shared_expert_intermediate_size": 0}, "qwen2_moe has no experts without a shared one"),
        ({"use_moe": True, "qk_norm": True}, "qwen3_moe has no shared expert.*--to transformers"),
        ({"num_attention_heads": 6, "head_dim": 8}, "llama has no hidden_size 32 for 6 heads"),
    ],
    ids=str,
)
def test_what_no_class_holds_is_refused_by_name(changes, reason, make_vlm, tokenizer, tmp_path):
    with pytest.raises(UserError, match=reason):
        export_llm(Source(make_decoder(**changes), tokenizer, "tiny"), new_folder(tmp_path))
    with pytest.raises(UserError, match=reason):
        export_llava(Source(make_vlm(**changes), tokenizer, "tiny"), new_folder(tmp_path, "llava"))


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"qkv_bias": True}, "qkv_bias True"),
        (QWEN3, "rms_norm_eps 1e-05"),
        ({"use_moe": True, "norm_topk_prob": False}, "norm_topk_prob False"),
        ({"use_moe": True, "shared_expert_gate": True}, "shared_expert_gate True"),
        ({"head_dim": 16}, "num_key_value_heads 2, head_dim 16"),
    ],
    ids=str,
)
def test_a_pth_that_could_not_tell_a_setting_is_refused(changes, lost, tokenizer, tmp_path):
    write = export_minimind3v if "qk_norm" in changes else export_minimind
    with pytest.raises(UserError, match=f"cannot tell {lost}"):
        write(Source(make_decoder(**changes), tokenizer, "tiny"), tmp_path)


@pytest.mark.parametrize("changes", [{}, {"use_moe": True, "num_experts_per_tok": 1, "norm_topk_prob": True}], ids=str)
@torch.no_grad()
def test_a_pth_of_minimind_3_goes_and_comes(changes, tokenizer, tmp_path):
    """Norms for queries and keys tell the generation, and with it the epsilon, the heads and the experts' weights."""
    shared = {"shared_expert_intermediate_size": 0} if changes else {}
    model = make_decoder(**QWEN3, rms_norm_eps=1e-6, **changes, **shared)
    export_minimind3v(Source(model, tokenizer, "tiny"), tmp_path)
    again, ids = load_model(tmp_path / "tiny.pth"), make_ids(2, 20)
    assert again.config.to_dict() == model.config.to_dict()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
