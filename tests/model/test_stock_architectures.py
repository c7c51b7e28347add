"""The decoder is Llama, with experts Qwen2-MoE, and stretches its positions as transformers does."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2MoeForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers.models import LLAMA3, SIZES, YARN, make_decoder, make_ids
from model.attention import rope_frequencies
from model.config import ROPE_DEFAULT, MiniMindConfig
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from scripts.export.formats import Source, export_llm

YARN_WITH_ALL = {**YARN, "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 2.0,
                 "mscale_all_dim": 0.5}  # fmt: skip


def stock_of(model: MiniMindForCausalLM, tokenizer, folder) -> PreTrainedModel:
    """What transformers makes of the model's exported folder."""
    export_llm(Source(model, tokenizer, "tiny"), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "rope",
    [None, {"rope_theta": 1e4}, YARN, YARN_WITH_ALL, {**YARN, "attention_factor": 1.5}],
    ids=["plain", "theta", "yarn", "yarn with all", "attention factor"],
)
@torch.no_grad()
def test_dense_decoder_is_llama(rope, tokenizer, tmp_path):
    model = make_decoder(rope_parameters=rope)
    ids = make_ids(2, 60)
    stock = stock_of(model, tokenizer, tmp_path)
    assert isinstance(stock, LlamaForCausalLM)
    ours, theirs = model(ids).logits, stock(ids).logits
    assert ours.std() > 0.5  # logits near zero would be equal to anything
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_moe_decoder_is_qwen2_moe(top_k, tokenizer, tmp_path):
    model = make_decoder(use_moe=True, num_experts_per_tok=top_k)
    ids = make_ids(2, 30)
    stock = stock_of(model, tokenizer, tmp_path)
    assert isinstance(stock, Qwen2MoeForCausalLM)
    ours, theirs = model(ids).logits, stock(ids).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_number_of_experts_a_token_matters():
    """Without this the test before could pass on experts that do nothing."""
    ids = make_ids(1, 20)
    one, two = (make_decoder(use_moe=True, num_experts_per_tok=k)(ids).logits for k in (1, 2))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 16.0, "original_max_position_embeddings": 2048, "rope_theta": 1e6},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"attention_factor": 1.25},
        {"factor": 1.0},
        {"truncate": False},
        {"mscale": 1.5, "mscale_all_dim": 0.7},
        {"mscale": 1.5},  # alone it means nothing
        {"attention_factor": None, "beta_fast": None, "beta_slow": None},
        {"factor": 0.5},
        {"original_max_position_embeddings": 32768},  # more than the slowest pair turns: the blend ends past the head
    ],
    ids=str,
)
@pytest.mark.parametrize("head_size", [8, 64])
def test_yarn_is_that_of_transformers(changes, head_size):
    rope = {**YARN, **changes}
    sizes = {"hidden_size": 2 * head_size, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MiniMindConfig(rope_parameters=rope, **sizes)
    theirs = LlamaConfig(rope_parameters=dict(rope), **sizes)
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    frequencies, attention_factor = rope_frequencies(config)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-9)
    if rope["factor"] > 1:
        plain, _ = rope_frequencies(MiniMindConfig(rope_parameters={**rope, "rope_type": "default"}, **sizes))
        assert not torch.allclose(frequencies, plain)


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({**YARN, "rope_type": "dynamic"}, "rope_type must be 'default' or 'linear' or 'llama3' or 'yarn'"),
        ({**YARN, "rope_type": "linear"}, "original_max_position_embeddings, which is not known.* rope_theta, factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor None must be a number above 0"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor must be below high_freq_factor"),
        ({**YARN, "betafast": 8.0}, "betafast, which is not known.* beta_fast"),
        ({"partial_rotary_factor": 0.5, "rope_type": "default"}, "partial_rotary_factor, which is not known"),
        ({"rope_type": "yarn"}, "factor None must be a number above 0"),
        ({**YARN, "factor": "4"}, "factor 4 must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta 0 must be a number above 0"),
        ({"factor": 4.0}, "lack their rope_type"),
    ],
    ids=str,
)
def test_unknown_rope_is_refused(rope, reason):
    with pytest.raises(UserError, match=reason):
        MiniMindForCausalLM(MiniMindConfig(**SIZES, rope_parameters=rope))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ROPE_DEFAULT),
        ({"rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_parameters": {**YARN, "rope_theta": 1e4}, "rope_theta": 1e4}, {**YARN, "rope_theta": 1e4}),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
         {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 512}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, "rope_theta": 1e4},
         YARN),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_said_of_rope_is_as_in_minimind(given, expected):
    config = MiniMindConfig(**SIZES, **given)
    assert config.rope_parameters == expected
    assert MiniMindConfig(**config.to_dict()).rope_parameters == expected


def test_two_thetas_are_refused():
    with pytest.raises(UserError, match="rope_theta 10000.0 is not that of rope_parameters"):
        MiniMindConfig(**SIZES, rope_parameters=ROPE_DEFAULT, rope_theta=1e4)


def test_angles_stay_exact_in_a_half_precision_model():
    """bfloat16 knows 8 bits of a frequency: at position 3000 that would be several turns of error."""
    positions = torch.tensor([[1, 100, 3000]])
    expected = make_decoder().model.rotary(positions, torch.float32)
    found = make_decoder().bfloat16().model.rotary(positions, torch.float32)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
