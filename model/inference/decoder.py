"""The decoder as it answers: MiniMindForCausalLM's weights over a preallocated memory.

It says what the model itself says and is held to it by tests; it is faster because projections that read the same input
are one product, keys and values are written once into their place, and nothing is computed that no one reads.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model.inference.packed_linear import Packed
from model.model_minimind import DecoderLayer, FeedForward, MiniMindForCausalLM, MoEFeedForward

STEP = 256  # positions by which a memory and the table of angles grow


@dataclass
class Memory:
    """Keys and values of all positions so far [layers, 2, rows, key/value heads, capacity, head size]."""

    states: torch.Tensor
    length: int = 0  # positions filled
    padding: torch.Tensor | None = None  # [rows], so many of the first positions are none; None: no row has any

    def make_room(self, length: int) -> None:
        missing = length - self.states.shape[-2]
        if missing > 0:
            self.states = F.pad(self.states, (0, 0, 0, -(-missing // STEP) * STEP))

    def keep(self, rows: torch.Tensor) -> None:
        """Forget the other rows."""
        self.states = self.states[:, :, rows]
        self.padding = None if self.padding is None else self.padding[rows]

    def copy(self) -> torch.Tensor:
        """The states of the positions that are filled."""
        return self.states[..., : self.length, :].clone()


class Decoder:
    """The layers of a model, packed for its device; states of conversations are the callers' (Memory)."""

    def __init__(self, model: MiniMindForCausalLM, dtype: torch.dtype = torch.float32):
        """dtype: of the large products; on a CPU the rest stays in the model's float32."""
        self.config, self.rotary, self.embeddings = model.config, model.model.rotary, model.model.embed_tokens.weight
        self.layers = [_Layer(layer, dtype) for layer in model.model.layers]
        self.head = Packed(model.lm_head.weight.detach() * model.model.norm.weight.detach(), None, dtype)
        self.turns: torch.Tensor | None = None  # e^(i angle) [positions, head size / 2]

    def new_memory(self, rows: int, length: int) -> Memory:
        """Room for so many positions and the first STEP of an answer."""
        config = self.config
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, length + STEP, config.head_dim)
        return Memory(self.embeddings.new_zeros(shape))

    def __call__(self, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Read on: embeddings x [rows, seq, hidden] -> logits of the next token [rows, vocabulary] in float32."""
        rows, length, _ = x.shape
        start, end = memory.length, memory.length + length
        memory.make_room(end)
        table = self._turns_up_to(end)
        slots = torch.arange(start, end, device=x.device)
        turns = table[start:end]  # [seq, head size / 2]
        if memory.padding is not None:
            turns = table[(slots - memory.padding[:, None]).clamp(min=0)]  # [rows, seq, head size / 2]
        mask = self._mask(memory, slots) if memory.padding is not None or (start and length > 1) else None
        x, last = x.reshape(rows * length, -1), len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            states = memory.states[number, ..., :end, :]
            x = layer(x, (rows, length), turns.unsqueeze(-2), states, mask, only_last=number == last)
        memory.length = end  # only now: what raised in the middle has left nothing that counts
        return self.head(_normed(x, self.config.rms_norm_eps)).float()

    def _turns_up_to(self, length: int) -> torch.Tensor:
        """The caller's own reference: another thread may put a shorter table in the place of this one."""
        table = self.turns
        if table is None or len(table) < length:
            positions = torch.arange(-(-length // STEP) * STEP, device=self.embeddings.device)
            cos, sin = (
                angles[0, 0, :, : self.config.head_dim // 2] for angles in self.rotary(positions[None], torch.float32)
            )
            self.turns = table = torch.complex(cos, sin)
        return table

    @staticmethod
    def _mask(memory: Memory, slots: torch.Tensor) -> torch.Tensor:
        """[rows or 1, 1, seq, positions], true where a query at a slot may look."""
        seen = torch.arange(memory.length + len(slots), device=slots.device)
        mask = (seen <= slots[:, None])[None]
        if memory.padding is not None:
            mask = mask & (seen >= memory.padding[:, None])[:, None]
        return mask[:, None]


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [rows, hidden] without its weight, which the products after it have taken in."""
    if len(x) == 1 and x.device.type == "cpu":  # three small operations instead of six
        return x * (torch.dot(x[0], x[0]).item() / x.shape[1] + eps) ** -0.5
    return F.rms_norm(x, x.shape[-1:], None, eps)


def _pairs_together(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a query or key projection in the order in which RoPE's pairs (i, i + half) are neighbours.

    Queries and keys are both ordered so, their products stay what they were, and a turn is one complex product.
    """
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


class _Layer:
    def __init__(self, layer: DecoderLayer, dtype: torch.dtype):
        attention = layer.self_attn
        self.head_dim, self.groups, self.eps = attention.head_dim, attention.groups, layer.input_layernorm.eps
        query, key = (_pairs_together(p.weight.detach(), self.head_dim) for p in (attention.q_proj, attention.k_proj))
        weight = torch.cat([query, key, attention.v_proj.weight.detach()]) * layer.input_layernorm.weight.detach()
        self.query_key_value = Packed(weight, None, dtype)
        self.output = Packed(attention.o_proj.weight.detach(), None, dtype)
        self.heads = len(query) // self.head_dim
        routed = isinstance(layer.mlp, MoEFeedForward)
        self.mlp = (_MoEFeedForward if routed else _FeedForward)(
            layer.mlp, layer.post_attention_layernorm.weight.detach(), dtype
        )

    def __call__(
        self,
        x: torch.Tensor,
        shape: tuple[int, int],
        turns: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        only_last: bool,
    ) -> torch.Tensor:
        """x [rows * seq, hidden] -> the same, or with only_last [rows, hidden] of the last positions.

        states: [2, rows, key/value heads, positions, head size], to be filled at its last seq positions.
        """
        rows, length = shape
        projected = self.query_key_value(_normed(x, self.eps)).view(rows, length, -1, self.head_dim)
        asking = self.heads + states.shape[2]  # queries, then keys; values are not turned
        pairs = projected[:, :, :asking].float().unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)
        states[0, :, :, -length:] = turned[:, :, self.heads :].transpose(1, 2)
        states[1, :, :, -length:] = projected[:, :, asking:].transpose(1, 2)
        query = turned[:, :, : self.heads]
        if only_last and length > 1:  # of a prompt only the last position goes on; keys and values had to be there
            x, query, length = x.view(rows, length, -1)[:, -1], query[:, -1:], 1
            mask = mask if mask is None else mask[:, :, -1:]
        x = x + self.output(self._attend(query, states, mask).reshape(rows * length, -1))
        return x + self.mlp(_normed(x, self.eps))

    def _attend(self, query: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """query [rows, seq, heads, head size] -> the same; a single position's heads that share a key are its seq."""
        if query.shape[1] == 1:
            grouped = query.view(len(query), -1, self.groups, self.head_dim)
            return F.scaled_dot_product_attention(grouped, states[0], states[1], attn_mask=mask)
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), states[0], states[1], attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.groups > 1,
        ).transpose(1, 2)  # fmt: skip


class _FeedForward:
    def __init__(self, mlp: FeedForward, norm: torch.Tensor, dtype: torch.dtype):
        gate_up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
        self.gate_up, self.down = (
            Packed(gate_up * norm, None, dtype),
            Packed(mlp.down_proj.weight.detach(), None, dtype),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class _MoEFeedForward:
    """Each expert sees only the tokens that chose it."""

    def __init__(self, mlp: MoEFeedForward, norm: torch.Tensor, dtype: torch.dtype):
        self.top_k, self.gate = mlp.top_k, mlp.gate.weight.detach() * norm
        self.experts = [_FeedForward(expert, norm, dtype) for expert in mlp.experts]
        self.shared = _FeedForward(mlp.shared_experts[0], norm, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = F.linear(x, self.gate).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            scores = scores / scores.sum(-1, keepdim=True)
        mixed = self.shared(x)
        for number, expert in enumerate(self.experts):
            tokens, rank = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                mixed.index_add_(0, tokens, scores[tokens, rank, None].to(x.dtype) * expert(x[tokens]))
        return mixed
