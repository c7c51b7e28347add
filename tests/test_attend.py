"""Attention written out is torch's attention, with every kind of mask, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from model import attention
from model.attention import attend, attend_written_out


def heads(groups: int, asking: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    shapes = ((2, 2 * groups, asking, 16), (2, 2, 24, 16), (2, 2, 24, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outcome(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    mixed = function(*inputs)
    return [mixed.detach(), *torch.autograd.grad(mixed.square().sum(), inputs)]


def masks() -> dict[str, torch.Tensor | None]:
    some = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1)) < 0.3
    some |= torch.eye(24, dtype=torch.bool)
    return {"causal": None, "some": some, "few ask": some[:, :, :5]}


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("kind", masks())
def test_written_out_is_the_kernel(groups, kind):
    mask = masks()[kind]
    inputs = heads(groups, 24 if mask is None else mask.shape[2], torch.float32)
    expected = outcome(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True), inputs
    )
    found = outcome(lambda q, k, v: attend_written_out(q, k, v, mask, mask is None), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_training_in_bfloat16_takes_it_and_nothing_else_does(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "attend_written_out", lambda *inputs: taken.append(1) or attend_written_out(*inputs))
    exact = outcome(lambda q, k, v: attend(q, k, v, None), heads(2, 24, torch.float32))
    assert not taken
    found = outcome(lambda q, k, v: attend(q, k, v, None), heads(2, 24, torch.bfloat16))
    assert len(taken) == 1
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()  # bfloat16 keeps 8 bits
    attend(*(inputs.detach() for inputs in heads(2, 24, torch.bfloat16)), None)
    attend(*heads(2, 24, torch.bfloat16), None, dropout=0.1)
    assert len(taken) == 1


def test_a_row_that_may_look_nowhere_gives_numbers():
    mask = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    assert all(found.isfinite().all() for found in outcome(
        lambda q, k, v: attend_written_out(q, k, v, mask, False), heads(2, 24, torch.float32)
    ))  # fmt: skip
