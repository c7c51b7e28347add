"""The decoder for answering: MiniMindForCausalLM's weights over a preallocated cache of keys and values.

Tests hold it to what the model itself computes. It is faster because projections that read the same input are one
product, keys and values are written once into their place, and nothing is computed that is not used.
"""

import torch
from torch.nn import functional as F

from model.attention import Attention
from model.inference.cuda_graph import StepGraph
from model.inference.kv_cache import STEP, KVCache, Places
from model.inference.packed_linear import Packed
from model.layers import FeedForward, MoEFeedForward
from model.model_minimind import DecoderLayer, MiniMindForCausalLM


class Decoder:
    """The layers of a model, packed for its device. It has no state: keys and values are the caller's (KVCache)."""

    @torch.no_grad()
    def __init__(self, model: MiniMindForCausalLM, dtype: torch.dtype = torch.float32):
        """dtype: of the large products; on a CPU the rest stays in the model's float32."""
        self.config, self.embeddings = model.config, model.model.embed_tokens.weight
        self.layers = [_Layer(layer, dtype) for layer in model.model.layers]
        self.head = _packed(model.lm_head.weight * model.model.norm.weight, None, dtype)
        positions = torch.arange(self.config.max_position_embeddings, device=self.embeddings.device)
        cos, sin = (
            table[0, 0, :, : self.config.head_dim // 2] for table in model.model.rotary(positions[None], torch.float32)
        )
        self.rotary = torch.complex(cos, sin)  # e^(i angle) [positions, head_dim / 2]
        # Experts ask the host which tokens chose them, and a graph has no host.
        self.graphs = self.embeddings.device.type == "cuda" and not self.config.use_moe

    def new_cache(self, rows: int, length: int) -> KVCache:
        """Room for so many positions and the first STEP of an answer."""
        config = self.config
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, length + STEP, config.head_dim)
        return KVCache(self.embeddings.new_zeros(shape))

    def __call__(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read on: embeddings x [rows, seq, hidden] -> logits of the next token [rows, vocabulary] in float32."""
        cache.make_room(cache.length + x.shape[1])
        if not self.graphs or x.shape[1] > 1:
            return self.read(x, cache)
        if cache.graph is None or cache.graph.states is not cache.states:
            cache.graph = StepGraph(self, cache.states)
        return cache.graph(x, cache)

    def read(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """The same for any number of tokens, kernel by kernel; the cache has room for them."""
        start, end = cache.length, cache.length + x.shape[1]
        positions = torch.arange(start, end, device=x.device)
        rotary = self.rotary[start:end]  # [seq, head_dim / 2]
        if cache.padding is not None:
            rotary = self.rotary_at(positions - cache.padding[:, None])
        mask = self._mask(cache, positions) if cache.padding is not None or (start and len(positions) > 1) else None
        places = Places(rotary.unsqueeze(-2), slice(start, end), mask)
        logits = self.logits(x, cache.states[..., :end, :], places)
        cache.length = end  # only now: what a layer that raised has written does not count
        return logits

    def logits(self, x: torch.Tensor, states: torch.Tensor, places: Places) -> torch.Tensor:
        """All layers: x [rows, seq, hidden], states as KVCache has them -> logits of the next token in float32."""
        x = x.flatten(0, 1)
        for number, layer in enumerate(self.layers):
            x = layer(x, places, states[number], only_last=number == len(self.layers) - 1)
        return self.head(_normed(x, self.config.rms_norm_eps)).float()

    def rotary_at(self, positions: torch.Tensor) -> torch.Tensor:
        """[rows, seq] -> [rows, seq, head_dim / 2]. Clamped: on a GPU an index out of range would end the process."""
        return self.rotary[positions.clamp(0, len(self.rotary) - 1)]

    @staticmethod
    def _mask(cache: KVCache, positions: torch.Tensor) -> torch.Tensor:
        """[rows or 1, 1, seq, all positions], true where a query at one of the positions may look."""
        seen = torch.arange(cache.length + len(positions), device=positions.device)
        mask = (seen <= positions[:, None])[None]
        if cache.padding is not None:
            mask = mask & (seen >= cache.padding[:, None])[:, None]
        return mask[:, None]


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [rows, hidden] without its weight, which the weights of the products after it contain."""
    if len(x) == 1 and x.device.type == "cpu":  # three small operations instead of six
        return x * (torch.dot(x[0], x[0]).item() / x.shape[1] + eps) ** -0.5
    return F.rms_norm(x, x.shape[-1:], None, eps)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Packed:
    """Of a product that a decoding step computes for one row."""
    return Packed(weight, bias, dtype, for_one_row=True)


def pairs_together(parameter: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a query or key projection in the order in which RoPE's pairs (i, i + half) are neighbours.

    Queries and keys are both reordered, so their products stay the same, and a rotation is one complex product here,
    and what llama.cpp does.
    parameter: [heads * head_dim, hidden], or [heads * head_dim] as biases and norms are.
    """
    heads = parameter.view(-1, 2, head_dim // 2, *parameter.shape[1:])
    return heads.transpose(1, 2).reshape(parameter.shape)


def _query_key_value(attention: Attention, norm: torch.Tensor, dtype: torch.dtype) -> Packed:
    """The three projections as one, with the weight of the norm before them."""
    turned = attention.q_proj, attention.k_proj
    weights = [pairs_together(projection.weight, attention.head_dim) for projection in turned]
    biases = None
    if attention.q_proj.bias is not None:
        turned_biases = (pairs_together(projection.bias, attention.head_dim) for projection in turned)
        biases = torch.cat([*turned_biases, attention.v_proj.bias])
    return _packed(torch.cat([*weights, attention.v_proj.weight]) * norm, biases, dtype)


def _head_norms(attention: Attention) -> torch.Tensor | None:
    """Weights of the norms of queries, then keys [heads, head_dim], None where there are none."""
    if attention.q_norm is None:
        return None
    per_head = []
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        weight = pairs_together(norm.weight, attention.head_dim)
        per_head.append(weight.expand(projection.out_features // attention.head_dim, -1))
    return torch.cat(per_head)


class _Layer:
    def __init__(self, layer: DecoderLayer, dtype: torch.dtype):
        attention = layer.self_attn
        self.head_dim, self.groups, self.eps = attention.head_dim, attention.groups, layer.input_layernorm.eps
        self.query_key_value = _query_key_value(attention, layer.input_layernorm.weight, dtype)
        self.head_norms = _head_norms(attention)
        self.output = _packed(attention.o_proj.weight, attention.o_proj.bias, dtype)
        self.heads = attention.q_proj.out_features // self.head_dim
        feed_forward = _MoEFeedForward if isinstance(layer.mlp, MoEFeedForward) else _FeedForward
        self.mlp = feed_forward(layer.mlp, layer.post_attention_layernorm.weight, dtype)

    def __call__(
        self,
        x: torch.Tensor,
        places: Places,
        states: torch.Tensor,
        only_last: bool,
    ) -> torch.Tensor:
        """x [rows * seq, hidden] -> the same, or with only_last [rows, hidden] of the last positions.

        states: [2, rows, key/value heads, positions, head_dim], whose new positions are filled here.
        """
        rows = states.shape[1]
        length = len(x) // rows
        projected = self.query_key_value(_normed(x, self.eps)).view(rows, length, -1, self.head_dim)
        rotated_heads = self.heads + states.shape[2]  # queries, then keys; values are not rotated
        turned = projected[:, :, :rotated_heads].float()
        if self.head_norms is not None:
            turned = F.rms_norm(turned, turned.shape[-1:], None, self.eps) * self.head_norms
        pairs = torch.view_as_complex(turned.view(rows, length, rotated_heads, -1, 2))
        rotated = torch.view_as_real(pairs * places.rotary).view(turned.shape).to(x.dtype)
        states[0, :, :, places.new] = rotated[:, :, self.heads :].transpose(1, 2)
        states[1, :, :, places.new] = projected[:, :, rotated_heads:].transpose(1, 2)
        query, mask = rotated[:, :, : self.heads], places.mask
        if only_last and length > 1:  # the last layer of a prompt: only its last position gives logits
            x, query, length, mask = x.view(rows, length, -1)[:, -1], query[:, -1:], 1, places.of_last()
        x = x + self.output(self._attend(query, states, mask).reshape(rows * length, -1))
        return x + self.mlp(_normed(x, self.eps))

    def _attend(self, query: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """query [rows, seq, heads, head_dim] -> the same."""
        if query.shape[1] == 1:
            # Query heads of one key stand where positions do: [rows, key/value heads, groups, head_dim].
            grouped = query.view(len(query), -1, self.groups, self.head_dim)
            return F.scaled_dot_product_attention(grouped, states[0], states[1], attn_mask=mask)
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), states[0], states[1], attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.groups > 1,
        ).transpose(1, 2)  # fmt: skip


class _FeedForward:
    def __init__(self, mlp: FeedForward, norm: torch.Tensor, dtype: torch.dtype):
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        biases = None if mlp.gate_proj.bias is None else torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
        self.gate_up = _packed(gate_up * norm, biases, dtype)
        self.down = _packed(mlp.down_proj.weight, mlp.down_proj.bias, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class _MoEFeedForward:
    """Each expert sees only the tokens that chose it."""

    def __init__(self, mlp: MoEFeedForward, norm: torch.Tensor, dtype: torch.dtype):
        self.top_k, self.sum_to_one, self.gate = mlp.top_k, mlp.weights_sum_to_one, mlp.gate.weight * norm
        self.experts = [_FeedForward(expert, norm, dtype) for expert in mlp.experts]
        self.shared = [_FeedForward(expert, norm, dtype) for expert in mlp.shared_experts]
        self.shared_gate = None if mlp.shared_expert_gate is None else mlp.shared_expert_gate.weight * norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = F.linear(x, self.gate).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.sum_to_one:
            scores = scores / scores.sum(-1, keepdim=True)
        mixed = self.shared[0](x) if self.shared else torch.zeros_like(x)
        if self.shared_gate is not None:
            mixed = mixed * F.linear(x, self.shared_gate).sigmoid()
        for number, expert in enumerate(self.experts):
            tokens, rank = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                mixed.index_add_(0, tokens, scores[tokens, rank, None].to(x.dtype) * expert(x[tokens]))
        return mixed
