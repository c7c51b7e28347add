"""What a decoder layer is made of beside attention: RMSNorm, SwiGLU, and a mixture of experts."""

import torch
from torch import nn
from torch.nn import functional as F

from model.config import MiniMindConfig


class RMSNorm(nn.Module):
    """Root mean square layer norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).to(product_dtype(x))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which matrix products run: a norm casts to it once, where autocast would for each product again."""
    device = x.device.type
    casts = not x.is_meta and torch.is_autocast_enabled(device)  # meta has no autocast, and asking it raises
    return torch.get_autocast_dtype(device) if casts else x.dtype


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: MiniMindConfig, size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEFeedForward(nn.Module):
    """num_experts routed feed-forwards, num_experts_per_tok of them for each token, and mostly a shared one for all."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.weights_sum_to_one, shared_size = config.weights_sum_to_one, config.shared_expert_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config, config.intermediate_size) for _ in range(config.num_experts))
        self.shared_experts = nn.ModuleList([FeedForward(config, shared_size)] if shared_size else [])
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [batch, seq, hidden] -> the same shape, and the balance loss of each sequence [batch].

        Every expert sees every token: at four experts that costs less than sorting tokens, needs no host
        synchronisation, and leaves no expert without a gradient when training runs on several ranks.
        """
        scores = self.gate(x).softmax(-1, dtype=torch.float32)  # [batch, seq, experts]
        top_scores, chosen = scores.topk(self.top_k, dim=-1)
        if self.weights_sum_to_one:
            top_scores = top_scores / top_scores.sum(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(-1, chosen, top_scores).to(x.dtype)
        mixed = sum(weights[..., index, None] * expert(x) for index, expert in enumerate(self.experts))
        for expert in self.shared_experts:  # one or none; after the others as in Qwen2-MoE: rounding differs least
            shared = expert(x)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(x).sigmoid() * shared
            mixed = mixed + shared
        return mixed, self._balance_loss(scores, chosen, token_mask)

    def _balance_loss(
        self, scores: torch.Tensor, chosen: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """For each sequence, [batch], fraction of choices times mean score, summed over experts: 1 when balanced.

        DeepSeek-V2's expert-level loss (arXiv 2405.04434, section 2.2.3); padding does not count.
        """
        real = scores.new_ones(scores.shape[:2]) if token_mask is None else token_mask.to(scores.dtype)
        real = real[..., None] / real.sum(1).clamp(min=1)[:, None, None]  # [batch, seq, 1], sums to 1 a sequence
        picks = torch.zeros_like(scores).scatter(-1, chosen, 1.0)  # [batch, seq, experts]
        fraction = (picks * real).sum(1) * self.num_experts / self.top_k  # [batch, experts]
        return (fraction * (scores * real).sum(1)).sum(-1)
