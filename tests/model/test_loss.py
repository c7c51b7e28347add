"""Loss and gradients in pieces are those of all logits at once, and take no more memory for more tokens."""

import pytest
import torch
from torch import nn

from helpers.models import make_ids, make_labels, untrained_decoder
from model import loss as loss_module
from model.config import IGNORE_INDEX
from model.loss import summed_cross_entropy
from scripts.measure.memory import Account

TOKENS, HIDDEN, VOCABULARY = 37, 16, 300
WITHIN = {torch.float32: 5e-6, torch.bfloat16: 0.02, torch.float16: 3e-3}  # of the largest gradient


@pytest.fixture
def in_pieces(monkeypatch):
    """in_pieces(tokens): at most so many at once; 0: all."""

    def cut(tokens: int) -> None:
        monkeypatch.setattr(loss_module, "MOST_LOGITS", tokens * VOCABULARY or 1 << 60)

    return cut


def gradients(head: nn.Linear, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, ...]:
    """Loss, and the gradients of states and head, of tokens of which some count nothing."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[::5] = IGNORE_INDEX
    head.weight.grad = None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = summed_cross_entropy(head, states.to(dtype), targets, dtype)
    (scale * loss).backward()
    return loss.detach(), states.grad, head.weight.grad


@pytest.fixture
def head():
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, VOCABULARY, bias=False)


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("tokens", [1, 8, 36])
def test_pieces_give_the_whole_loss_and_its_gradients(dtype, tokens, head, in_pieces):
    in_pieces(0)
    whole = gradients(head, dtype, scale=0.25)
    in_pieces(tokens)
    for found, wanted in zip(gradients(head, dtype, scale=0.25), whole, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= WITHIN[dtype] * wanted.abs().max()


def test_a_frozen_head_gets_no_gradient(head, in_pieces):
    head.requires_grad_(False)
    in_pieces(0)
    _, wanted, _ = gradients(head, torch.float32, 1.0)
    in_pieces(8)
    _, found, of_head = gradients(head, torch.float32, 1.0)
    assert torch.allclose(found, wanted, atol=1e-6) and of_head is None


def test_validation_computes_no_gradient(head, in_pieces, monkeypatch):
    in_pieces(8)
    states, targets = torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS)
    learnt = summed_cross_entropy(head, states, targets, torch.float32)
    with torch.no_grad():
        monkeypatch.setattr(torch, "zeros_like", None)  # what a gradient is added up in
        loss = summed_cross_entropy(head, states, targets, torch.float32)
    assert torch.equal(loss, learnt) and not loss.requires_grad


def test_a_head_that_does_more_is_asked_as_a_whole(head, in_pieces):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(HIDDEN, VOCABULARY, bias=False)
    doubled.weight = nn.Parameter(head.weight / 2)
    states, targets = torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS)
    in_pieces(8)
    found, wanted = (summed_cross_entropy(one, states, targets, torch.float32) for one in (doubled, head))
    assert torch.allclose(found, wanted)


def test_a_decoder_learns_the_same_in_pieces(in_pieces):
    """Tied: the embeddings' gradient is that of the head and of the tokens together."""
    model, ids = untrained_decoder().train(), make_ids(3, 40)
    labels, found = make_labels(ids), []
    for tokens in (0, 9):
        in_pieces(tokens)
        model.zero_grad()
        model(input_ids=ids, labels=labels, supervised_tokens=50).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert 60 * model.config.vocab_size > loss_module.MOST_LOGITS
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_more_tokens_take_no_more_logits(head, in_pieces):
    peaks = []
    for tokens in (64, 256):
        states, targets = torch.randn(tokens, HIDDEN, requires_grad=True), torch.zeros(tokens, dtype=torch.long)
        in_pieces(32)
        with Account() as account:
            summed_cross_entropy(head, states, targets, torch.float32).backward()
        peaks.append(account.peak)
    assert peaks[1] - peaks[0] < 0.5 * 4 * VOCABULARY * 192  # of the logits of 192 tokens more, in float32
