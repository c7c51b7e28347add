"""Attention written out is torch's attention, with every kind of mask, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from model import attention
from model.attention import attend, attend_written_out, causal_mask, hide_empty_slots
from model.model_minimind import MiniMindForCausalLM


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


def test_eager_trains_in_bfloat16_on_a_cpu(tiny_config):
    """transformers makes masks of floats for "eager", which `~` refuses; ours are booleans whatever the name."""
    ids, mask = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    losses = []
    for name in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = MiniMindForCausalLM._from_config(tiny_config, attn_implementation=name).bfloat16().train()
        losses.append(model(input_ids=ids, attention_mask=mask, labels=ids).loss)
        losses[-1].backward()
    assert losses[0].isfinite() and torch.equal(*losses)


def test_a_row_that_may_look_nowhere_gives_numbers():
    mask = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    assert all(found.isfinite().all() for found in outcome(
        lambda q, k, v: attend_written_out(q, k, v, mask, False), heads(2, 24, torch.float32)
    ))  # fmt: skip


@pytest.mark.parametrize("seen", (0, 7))
@pytest.mark.parametrize("length", (1, 5))
@pytest.mark.parametrize("padded", (False, True))
def test_causal_mask_looks_back_and_not_at_padding(seen, length, padded):
    attention_mask = torch.ones(2, seen + length, dtype=torch.long)
    attention_mask[1, :3] = 0 if padded and seen else 1
    found = causal_mask(attention_mask, seen, length, torch.device("cpu"))
    without = causal_mask(None, seen, length, torch.device("cpu"))
    for row in range(2):
        for query in range(length):
            for key in range(seen + length):
                back = key <= seen + query
                assert bool(back and attention_mask[row, key]) == looks(found, row, query, key, seen)
                assert back == looks(without, row, query, key, seen)


def looks(mask: torch.Tensor | None, row: int, query: int, key: int, seen: int) -> bool:
    """None means is_causal over the tokens alone, or everything for a single one."""
    if mask is None:
        return key <= seen + query
    return bool(mask.expand(2, -1, -1, -1)[row, 0, query, key])


def test_a_mask_that_generate_made_is_taken_as_it_is():
    allowed = torch.rand(1, 1, 3, 5) < 0.5
    added = torch.zeros(1, 1, 3, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, added):
        assert torch.equal(causal_mask(mask, 2, 3, torch.device("cpu")), allowed)


def test_places_of_a_fixed_cache_that_nothing_was_written_to_are_hidden():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4)
    expected = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()[None, None]
    assert torch.equal(hide_empty_slots(None, query, 4, key), expected)
    assert torch.equal(hide_empty_slots(expected[..., :4], query, 4, key), expected)
    assert hide_empty_slots(None, query, 6, key) is None
