"""The decoder is Llama, with experts Qwen2-MoE, and stretches its positions as transformers does."""

import pytest
import torch
from conftest import SIZES
from test_model import make_decoder, make_ids
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.attention import rope_frequencies
from model.config import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from scripts.export_stock import stock_decoder

# originals this short make YaRN stretch some of the few pairs of a tiny head, keep some and blend some
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
@torch.no_grad()
def test_dense_decoder_is_llama(rope):
    model = make_decoder(rope_parameters=rope)
    ids = make_ids(2, 60)
    stock = stock_decoder(model)
    assert isinstance(stock, LlamaForCausalLM)
    ours, theirs = model(ids).logits, stock(ids).logits
    assert ours.std() > 0.5  # logits near zero would be equal to anything
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_moe_decoder_is_qwen2_moe(top_k):
    model = make_decoder(use_moe=True, num_experts_per_tok=top_k)
    ids = make_ids(2, 30)
    stock = stock_decoder(model)
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


def test_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="yarn"):
        MiniMindForCausalLM(MiniMindConfig(**SIZES, rope_parameters={**YARN, "rope_type": "linear"}))


def test_angles_stay_exact_in_a_half_precision_model():
    """bfloat16 knows 8 bits of a frequency: at position 3000 that would be several turns of error."""
    positions = torch.tensor([[1, 100, 3000]])
    expected = make_decoder().model.rotary(positions, torch.float32)
    found = make_decoder().bfloat16().model.rotary(positions, torch.float32)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
