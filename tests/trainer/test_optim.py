"""Muon: singular values made alike, its matrices and AdamW's share apart, and steps that a scaler may skip."""

import copy
import dataclasses
import math

import pytest
import torch

from trainer.optim import Muon, build_optimizer, freeze_all_but, orthogonalized
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
