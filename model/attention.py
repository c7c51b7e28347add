"""Attention: rotary positions (RoPE and its ways to longer contexts), masks, and grouped-query attention itself."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from model.config import LLAMA3_NUMBERS, YARN_NUMBERS, MiniMindConfig, check_rope
from model.layers import RMSNorm

SHORT = 1024  # tokens a row up to which `attend` writes attention out on a CPU; 0: never, as on other devices


def rope_frequencies(config: MiniMindConfig) -> tuple[torch.Tensor, float]:
    """Radians per token of each pair of a head, [head_dim / 2], and the factor on cos and sin.

    RoPE: Su et al. 2021, arXiv 2104.09864. With rope_parameters {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
    "original_max_position_embeddings": 2048} (YaRN: Peng et al. 2023, arXiv 2309.00071) pairs that rotate slowly over
    the original context are slowed down by `factor`, fast ones are kept, those between are blended. YARN_OPTIONS mean
    what they do in transformers. "linear" slows down all pairs alike, "llama3" is Llama 3.1's blend.

    Raises:
        UserError: rope_parameters hold something else, which would otherwise give other angles in silence.
    """
    scaling = config.rope_parameters
    check_rope(scaling)  # again: from_pretrained(rope_parameters=...) sets them on a config that is made already
    size, base = config.head_dim, scaling["rope_theta"]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)  # to the bit as Llama rounds it
    if scaling["rope_type"] == "default":
        return frequencies, 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3_frequencies(frequencies, *(scaling[name] for name in LLAMA3_NUMBERS)), 1.0
    factor, original = (scaling[name] for name in YARN_NUMBERS)
    edge_down, edge_up = (math.floor, math.ceil) if scaling.get("truncate", True) else (float, float)

    def pair_with(rotations: float) -> float:
        """The index of the pair that rotates so many times over the original context."""
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(edge_down(pair_with(scaling.get("beta_fast") or 32.0)), 0)
    high = min(edge_up(pair_with(scaling.get("beta_slow") or 1.0)), size - 1)
    stretched = ((torch.arange(size // 2) - low) / (high - low or 1e-3)).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / factor * stretched, _attention_factor(scaling)


def llama3_frequencies(
    frequencies: torch.Tensor, factor: float, low: float, high: float, original: float
) -> torch.Tensor:
    """Llama 3.1's: pairs that turn fewer than `low` times over the original context are slowed down by `factor`.

    Those that turn more than `high` times are kept, and those between are blended by how often they turn.
    """
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def _attention_factor(scaling: dict) -> float:
    """YaRN's factor on cos and sin: as given, or from how much longer the context becomes."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    growth = 0.1 * math.log(max(scaling["factor"], 1.0))
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (mscale * growth + 1.0) / (mscale_all_dim * growth + 1.0)
    return growth + 1.0


class RotaryEmbedding(nn.Module):
    """Positions to the angles by which queries and keys are rotated."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        frequencies, self.attention_factor = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, *arguments, **options) -> "RotaryEmbedding":
        """What `.to()` and `.half()` call: the frequencies move with the model, but are never rounded."""
        super()._apply(*arguments, **options)
        self.frequencies = rope_frequencies(self.config)[0].to(self.frequencies.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [batch, 1, seq, head_dim] of positions [batch, seq]; the angles are always computed in fp32."""
        angles = position_ids[:, None, :, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def branch_mask(branches: torch.Tensor) -> torch.Tensor:
    """The mask of rows that hold several conversations about one picture, true where a token may look.

    branches: [batch, 2, seq], for each token the numbers of its own branch and of the prefix that it shares with
        others. It looks back at tokens of either, and at no other branch.

    Returns [batch, 1, seq, seq].
    """
    own, prefix = branches[:, :1, :, None], branches[:, 1:, :, None]  # [batch, 1, seq, 1]
    branch_of_key = branches[:, :1, None, :]  # [batch, 1, 1, seq]
    return ((own == branch_of_key) | (prefix == branch_of_key)).tril()


def causal_mask(
    attention_mask: torch.Tensor | None, cached: int | torch.Tensor, length: int, device: torch.device
) -> torch.Tensor | None:
    """True where `length` tokens may look that come after `cached` others: back, and not at padding.

    attention_mask: [batch, cached + length], 0 at padding; or [batch, 1, length, keys], what generate() makes for a
        cache of fixed size: booleans, or floats of which 0 is visible.

    Returns [batch or 1, 1, length, cached + length or keys]; None where is_causal, or a single token, says the same.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    if attention_mask is None or attention_mask.all():
        if length == 1 or not cached:
            return None
        return last_rows_causal(length, int(cached) + length, device)
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return attention_mask[:, None, None].bool() & (keys <= keys[-length:, None])


def last_rows_causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[1, 1, queries, keys]: the last `queries` rows of the causal mask of `keys` tokens."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def hide_empty_slots(
    mask: torch.Tensor | None, query: torch.Tensor, filled: int, key: torch.Tensor
) -> torch.Tensor | None:
    """The mask for the keys of a cache of fixed size, which returns all its slots: from `filled` on they are empty."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None and slots > filled:
        mask = last_rows_causal(queries, filled, key.device)
    return mask if mask is None or mask.shape[-1] == slots else F.pad(mask, (0, slots - mask.shape[-1]))


def gather_positions(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [batch, seq, size] at positions [batch, n] -> [batch, n, size]."""
    positions = positions.to(x.device)  # the layers of a model may stand on several devices
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _mask_at(mask: torch.Tensor | None, positions: torch.Tensor, length: int) -> torch.Tensor:
    """The rows [batch, 1, n, seq] of positions [batch, n] in mask [batch, 1, seq, seq]; None is the causal one."""
    if mask is None:
        return (torch.arange(length, device=positions.device) <= positions[..., None])[:, None]
    return gather_positions(mask.expand(len(positions), -1, -1, -1).squeeze(1), positions)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [batch, heads, seq, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    short: int = SHORT,
) -> torch.Tensor:
    """query [batch, heads, n, head_dim], key and value [batch, key/value heads, seq, head_dim] -> as query.

    mask: [batch, 1, n, seq], true where a query may look; None: causal.
    short: tokens of a row up to which a CPU that trains in bfloat16 takes attend_written_out.
    """
    causal = mask is None and query.shape[2] > 1
    trains_in_bfloat16 = query.requires_grad and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if trains_in_bfloat16 and not dropout and key.shape[2] <= short:
        return attend_written_out(query, key, value, mask, causal)
    if query.is_cuda and mask is not None:  # no fused kernel there takes both a mask and heads that share a key
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal,
        enable_gqa=query.shape[1] > key.shape[1],
    )  # fmt: skip


def attend_written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """The same as two products with a softmax between, whose weights [batch, heads, n, seq] are kept for backward.

    For training in bfloat16 on a CPU: over rows of 256 tokens torch 2.13's kernel takes twice as long there, most of it
    in backward, at 640 a third longer, and at 2,048 it wins.
    """
    groups = query.shape[1] // key.shape[1]
    if causal:
        mask = last_rows_causal(query.shape[2], key.shape[2], query.device)
    bias = query.new_zeros(())
    if mask is not None:  # the lowest number, not minus infinity: a row that may look nowhere gives no NaN
        bias = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min).unsqueeze(-3)
    query = (query * query.shape[-1] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)  # heads that share a key in one
    scores = (query @ key.transpose(2, 3)).unflatten(2, (groups, -1))  # [batch, key/value heads, groups, n, seq]
    weights = (scores + bias).softmax(-1)
    return (weights.flatten(2, 3) @ value).unflatten(2, (groups, -1)).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query attention: each key and value head serves `groups` query heads."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.short = SHORT  # whoever counts on a CPU what another device would do sets it to 0
        query_size = config.num_attention_heads * config.head_dim  # mostly hidden_size; in Qwen3 a size of its own
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def query_and_key(self, asking: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of asking [batch, n, hidden] and keys of x [batch, seq, hidden], not rotated yet.

        Returns [batch, heads, n, head_dim] and [batch, key/value heads, seq, head_dim].
        """
        query, key = self._heads(self.q_proj(asking)), self._heads(self.k_proj(x))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [batch, seq, hidden] -> the same shape, or [batch, n, hidden] where only n positions [batch, n] ask."""
        asking = x if positions is None else gather_positions(x, positions)
        query, key = self.query_and_key(asking, x)
        value = self._heads(self.v_proj(x))
        key = rotate(key, *rotary)
        if positions is not None:
            rotary = tuple(
                gather_positions(angles.expand(len(x), -1, -1, -1).squeeze(1), positions)[:, None] for angles in rotary
            )
            mask = _mask_at(mask, positions, x.shape[1])
        query = rotate(query, *rotary)
        if cache is not None:
            filled = cache.get_seq_length(self.layer) + key.shape[2]
            key, value = cache.update(key, value, self.layer)
            mask = hide_empty_slots(mask, query, filled, key)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0, self.short)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [batch, seq or n, hidden]
