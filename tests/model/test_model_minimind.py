"""The decoder: its sizes, its losses against slow loops, and padding that changes nothing."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.models import SIZES, make_decoder, make_ids, make_labels, naive_losses
from model.config import IGNORE_INDEX, MiniMindConfig, VLMConfig
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

# sizes


@pytest.mark.parametrize(
    ("hidden_size", "layers", "exact", "millions"), [(512, 8, 25_829_888, 25.83), (768, 16, 104_030_976, 104.03)]
)
def test_parameter_count(hidden_size, layers, exact, millions):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=layers))
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    assert round(exact / 1e6, 2) == millions


def test_defaults_are_the_smaller_model():
    config = MiniMindConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (512, 8, 1408)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (8, 2, 6400)


def test_projector_is_one_linear_layer_and_the_tower_is_not_trained():
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 25_829_888 + 768 * 512 + 512
    assert model.config.image_tokens == 196


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "30 must be a multiple of num_attention_heads 4, or head_dim"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 must be a multiple of num_key_value_heads 3"),
        ({"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}, "head size 3 is odd"),
        ({"head_dim": 9}, "head size 9 is odd"),
        ({"use_moe": True, "num_experts": 2, "num_experts_per_tok": 3}, "3 is not within 1..num_experts 2"),
        ({"shared_expert_gate": True, "shared_expert_intermediate_size": 0}, "shared_expert_gate needs a shared"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        MiniMindConfig(**{**SIZES, **sizes})


# the loss


@torch.no_grad()
def test_loss_is_the_naive_cross_entropy():
    model, ids = make_decoder(), make_ids(3, 20)
    labels = make_labels(ids)
    losses = naive_losses(model(ids).logits, labels)
    output = model(ids, labels=labels)
    assert 20 < len(losses) < 40
    assert float(output.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert output.logits is None and output.aux_loss is None


@pytest.mark.parametrize(
    "decoder",
    [
        {}, {"use_moe": True}, {"qk_norm": True, "head_dim": 16},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"use_moe": True, "shared_expert_gate": True, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
        {"use_moe": True, "shared_expert_intermediate_size": 0, "qk_norm": True},
    ],
    ids=str,
)  # fmt: skip
def test_loss_computed_where_labels_are_has_the_gradients_of_logits_everywhere(decoder):
    """The last dense layer and the head run at supervised positions only; rows with 0, few and many of them."""
    model, ids = make_decoder(**decoder, router_aux_loss_coef=0.0), make_ids(4, 20)
    labels = make_labels(ids)
    labels[1], labels[2, :-1] = IGNORE_INDEX, IGNORE_INDEX
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    slow = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    slow.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    fast = model(ids, labels=labels).loss
    fast.backward()
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("count", [7, torch.tensor(123)], ids=["number", "tensor"])
def test_supervised_tokens_divides(count):
    model, ids = make_decoder(), make_ids(2, 12)
    labels = make_labels(ids)
    loss = model(ids, labels=labels, supervised_tokens=count).loss
    assert float(loss) == pytest.approx(sum(naive_losses(model(ids).logits, labels)) / int(count), rel=1e-5)


@pytest.mark.parametrize("use_moe", [False, True])
def test_micro_batches_add_up_to_the_whole_step(use_moe):
    model, ids = make_decoder(use_moe=use_moe).train(), make_ids(4, 12)
    labels = make_labels(ids)
    labels[0] = IGNORE_INDEX  # rows weigh by their tokens, not alike
    whole = model(ids, labels=labels)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    total = 0.0
    for row in range(4):
        part = slice(row, row + 1)
        loss = model(ids[part], labels=labels[part], supervised_tokens=count, sequences=4).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [None, 0])
def test_no_label_at_all_is_a_loss_of_zero(count):
    model, ids = make_decoder().train(), make_ids(2, 8)
    loss = model(ids, labels=torch.full_like(ids, IGNORE_INDEX), supervised_tokens=count).loss
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())


@torch.no_grad()
def test_a_label_at_the_first_position_has_nothing_before_it():
    model, ids = make_decoder(), make_ids(1, 6)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 0] = ids[0, 0]
    assert float(model(ids, labels=labels).loss) == 0.0


@torch.no_grad()
def test_logits_to_keep():
    model, ids = make_decoder(), make_ids(2, 10)
    full = model(ids).logits
    assert full.shape == (2, 10, 6400)
    torch.testing.assert_close(model(ids, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, 7:])
    index = torch.tensor([1, 4, 9])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, full[:, [1, 4, 9]])
    with_labels = model(ids, labels=ids, logits_to_keep=1)
    torch.testing.assert_close(with_labels.logits, full[:, 9:])
    assert with_labels.loss > 0


# the balance loss


def slow_balance_losses(model, ids: torch.Tensor, real: torch.Tensor) -> list[float]:
    """Per sequence and summed over layers: experts' share of the choices times their mean score, in plain loops."""
    router_logits = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: router_logits.append(output))
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    losses = []
    for row in range(len(ids)):
        total = 0.0
        for logits in router_logits:
            picks, scores, length = [0] * experts, [0.0] * experts, 0
            for position in range(ids.shape[1]):
                if real[row, position]:
                    chances = np.exp(logits[row, position].double().numpy())
                    chances /= chances.sum()
                    length += 1
                    for expert in np.argsort(-chances)[:top_k]:
                        picks[expert] += 1
                    for expert in range(experts):
                        scores[expert] += chances[expert]
            for expert in range(experts):
                total += (picks[expert] * experts / (top_k * length)) * (scores[expert] / length)
        losses.append(total)
    return losses


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_that_of_a_slow_loop_and_in_the_loss(top_k):
    model = make_decoder(use_moe=True, num_experts_per_tok=top_k, router_aux_loss_coef=0.3)
    ids = make_ids(3, 14)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 9:] = real[2, 4:] = False  # rows of 14, 9 and 4 tokens
    ids = ids.masked_fill(~real, model.config.pad_token_id)
    labels = make_labels(ids).masked_fill(~real, IGNORE_INDEX)
    output = model(ids, labels=labels)
    rows = slow_balance_losses(model, ids, real)
    expected = 0.3 * sum(rows) / 3
    assert float(output.aux_loss) == pytest.approx(expected, rel=1e-5)
    cross_entropy = np.mean(naive_losses(model(ids).logits, labels))
    assert float(output.loss) == pytest.approx(cross_entropy + expected, rel=1e-5)
    counted_with_padding = 0.3 * sum(slow_balance_losses(model, ids, torch.ones_like(real))) / 3
    assert counted_with_padding != pytest.approx(expected, rel=1e-3)
    several = model(ids, labels=labels, sequences=12)
    assert float(several.aux_loss) == pytest.approx(expected / 4, rel=1e-5)


@torch.no_grad()
def test_balance_loss_of_a_balanced_router_is_one_a_layer():
    model = make_decoder(use_moe=True, router_aux_loss_coef=1.0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()  # all scores alike: shares are whatever, the mean score is 1 / experts
    ids = make_ids(2, 9)
    assert float(model(ids, labels=ids).aux_loss) == pytest.approx(SIZES["num_hidden_layers"], rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_learns_from_the_cross_entropy_alone(top_k):
    model = make_decoder(use_moe=True, num_experts_per_tok=top_k, router_aux_loss_coef=0.0).train()
    ids = make_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() > 1e-3


def test_router_learns_from_the_balance_loss_alone():
    model, ids = make_decoder(use_moe=True).train(), make_ids(2, 20)
    model(ids, labels=torch.full_like(ids, IGNORE_INDEX)).loss.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 1e-5 for layer in model.model.layers)


def test_experts_without_a_token_still_get_a_gradient():
    """Ranks that saw other tokens wait for it."""
    model, ids = make_decoder(use_moe=True, num_experts=8, num_experts_per_tok=1).train(), make_ids(1, 2)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    idle = [expert for expert in model.model.layers[0].mlp.experts if not expert.up_proj.weight.grad.any()]
    assert len(idle) >= 6  # two tokens of one expert each


# padding


@torch.no_grad()
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_padding_on_the_right_changes_nothing(use_moe, with_mask):
    model, ids = make_decoder(use_moe=use_moe), make_ids(1, 9)
    padded = F.pad(ids, (0, 5), value=model.config.pad_token_id)
    mask = (padded != model.config.pad_token_id).long() if with_mask else None
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, :9], model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing_with_mask_and_positions():
    model, ids = make_decoder(), make_ids(1, 9)
    padded = F.pad(ids, (5, 0), value=model.config.pad_token_id)
    mask = (padded != model.config.pad_token_id).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:], expected, rtol=0, atol=1e-5
    )
    assert (model(padded).logits[:, 5:] - expected).abs().max() > 0.01  # what the mask is for


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits():
    model, ids = make_decoder(), make_ids(1, 9)
    changed = ids.clone()
    changed[0, 6:] = make_ids(1, 3, seed=5)
    one, other = model(ids).logits, model(changed).logits
    torch.testing.assert_close(one[:, :6], other[:, :6], rtol=0, atol=1e-5)
    assert (one[:, 6:] - other[:, 6:]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_fed_in_pieces_through_the_cache(masked):
    model, ids = make_decoder(), make_ids(2, 12)
    cache, pieces = None, []
    for start, end in ((0, 5), (5, 11), (11, 12)):
        mask = torch.ones(2, end, dtype=torch.long) if masked else None
        output = model(ids[:, start:end], attention_mask=mask, use_cache=True, **{CACHE_NAME: cache})
        cache = output[CACHE_NAME]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only():
    model, ids = make_decoder(dropout=0.5), make_ids(1, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
