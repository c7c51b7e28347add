"""The loss of many tokens over a large vocabulary, without all of their logits at once."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.config import IGNORE_INDEX

MOST_LOGITS = 1 << 26  # computed at once: 10,485 tokens of 6,400, or 1,365 of 49,152; 0.5 GB in bfloat16 with gradients


def summed_cross_entropy(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The sum over hidden states [..., hidden] of the cross-entropy of the tokens [...] after them.

    head: hidden states to logits; dtype: of its product. Targets of IGNORE_INDEX count nothing.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    pieces = -(-len(hidden) * head.weight.shape[0] // MOST_LOGITS)
    if pieces > 1 and type(head) is nn.Linear and head.bias is None:  # others, an adapter's above all, do more
        hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
        return _InPieces.apply(hidden, head.weight, targets, dtype, pieces, torch.is_grad_enabled())
    logits = head(hidden).float()  # [tokens, vocabulary]
    return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


class _InPieces(torch.autograd.Function):
    """Loss and gradients of some tokens after others, so that memory does not grow with the batch.

    A loss is the last thing that is computed: its gradients are known as soon as the logits are, and computing them
    here, while the logits are there, costs nothing that the backward pass would not, where computing logits again for
    it made the head half as slow again.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, pieces: int,
        learns: bool,
    ) -> torch.Tensor:  # fmt: skip
        rounded, loss = weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if learns and ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if learns and ctx.needs_input_grad[1] else None
        start = 0
        for states, wanted in zip(hidden.to(dtype).chunk(pieces), targets.chunk(pieces), strict=True):
            counts, wanted = (wanted != IGNORE_INDEX)[:, None], wanted.clamp(min=0)[:, None]
            scores = torch.mm(states, rounded.T).float()  # [piece, vocabulary]
            normalizer = scores.logsumexp(-1, keepdim=True)
            loss += ((normalizer - scores.gather(1, wanted)) * counts).sum()
            # Of each logit: its probability, less one at the wanted token.
            gradient = scores.sub_(normalizer).exp_().mul_(counts)
            gradient = gradient.scatter_add_(1, wanted, -counts.to(gradient.dtype)).to(dtype)
            if of_hidden is not None:
                of_hidden[start : start + len(states)] = torch.mm(gradient, rounded)
            if of_weight is not None:
                of_weight += torch.mm(gradient.T, states)
            start += len(states)
        ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * scale for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None
