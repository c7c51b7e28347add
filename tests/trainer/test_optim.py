"""Muon: singular values made alike, its matrices and AdamW's share apart, and steps that a scaler may skip."""

import copy
import dataclasses
import math

import pytest
import torch

from helpers.models import untrained_decoder
from trainer.optim import Muon, build_optimizer, count_parts, freeze_all_but, orthogonalized, table_of_parts
from trainer.train_sft_vlm import SFT_VLM

MUON = dataclasses.replace(SFT_VLM, optimizer="muon", learning_rate=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_come_out_alike(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(matrix)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert float(values.max()) < 1.3 and float(values.median()) > 0.6
    assert float(torch.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0)) > 0.95
    half = orthogonalized(matrix.bfloat16()).float()
    assert float(torch.cosine_similarity(half.flatten(), found.flatten(), dim=0)) > 0.99
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def stepped(model, config, gradients: dict[str, torch.Tensor]):
    """A copy of the model after two steps with the same gradients."""
    model = copy.deepcopy(model)
    freeze_all_but(model, config.trainable)
    optimizer = build_optimizer(model, config)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone() if parameter.requires_grad else None
        optimizer.step()
    return dict(model.named_parameters())


def test_only_matrices_of_the_decoder_layers_are_muons(make_vlm):
    model = make_vlm()
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    before = dict(model.named_parameters())
    muon = stepped(model, MUON, gradients)
    adamw = stepped(model, dataclasses.replace(MUON, optimizer="adamw"), gradients)
    for name, parameter in muon.items():
        own = ".layers." in name and parameter.dim() == 2 and not name.startswith("vision_encoder.")
        assert torch.equal(parameter, adamw[name]) != own, name
        if own:  # both steps go the gradient's way, 0.2 of the rate a number in the root mean square
            moved = parameter - before[name] * (1 - 1e-3 * 0.1) ** 2
            wanted = -2 * 0.2e-3 * math.sqrt(max(parameter.shape)) * orthogonalized(gradients[name])
            torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)


def test_the_gate_of_a_shared_expert_is_a_vector_and_adamw_s():
    model = untrained_decoder(use_moe=True, shared_expert_gate=True, qk_norm=True)
    groups = build_optimizer(model, MUON).param_groups
    muon = {parameter for group in groups if group["muon"] for parameter in group["params"]}
    learning = dict(model.model.layers[0].named_parameters())
    assert {name for name, parameter in learning.items() if parameter not in muon} == {
        "mlp.shared_expert_gate.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }  # fmt: skip


def test_first_and_last_layer_can_learn_alone(make_vlm):
    """MiniMind-3V's choice; its line stands in the table only then."""
    model = make_vlm(num_hidden_layers=3)
    config = dataclasses.replace(SFT_VLM, trainable=("projector", "first_layer", "last_layer"))
    freeze_all_but(model, config.trainable)
    learns = [all(p.requires_grad for p in layer.parameters()) for layer in model.model.layers]
    assert learns == [True, False, True] and not model.model.embed_tokens.weight.requires_grad
    parts = count_parts(model)
    first, last = (parts[f"language model, {which} layer"] for which in ("first", "last"))
    assert first == last and first["learning"] == first["parameters"] > 0
    assert parts["language model, other"]["learning"] == 0
    assert sum(part["parameters"] for part in parts.values()) == sum(p.numel() for p in model.parameters())
    assert "language model, first layer" in table_of_parts(model, config)
    for trainable in (("projector", "last_layer"), ("projector", "language_model")):
        freeze_all_but(model, trainable)
        assert "language model, first layer" not in count_parts(model)


def test_a_step_that_the_scaler_finds_infinite_changes_nothing():
    layer = torch.nn.Linear(8, 8)
    optimizer = Muon(
        [{"params": [layer.weight], "muon": True}, {"params": [layer.bias], "muon": False}], lr=1e-2, fused=True
    )
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = copy.deepcopy(layer.state_dict())
    for value, changes in ((math.inf, False), (1.0, True)):
        scaler.scale(layer(torch.ones(2, 8)).sum()).backward()
        layer.weight.grad[0, 0] *= value
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(before[name], p) != changes for name, p in layer.state_dict().items())
