"""The useful arithmetic of a training step, counted: forward and backward, for what learns and what is frozen."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.layers import MoEFeedForward
from model.model_minimind import DecoderLayer, MiniMindForCausalLM
from model.vision_encoder import build_tower, leading_tokens


class StepFlops:
    """Floating-point operations of a step, two a multiply-add, from totals over its rows.

    Only products of matrices count: norms, activations and the optimizer are a few percent more, and limited by memory.
    A product costs once forward, once more for the gradient of its input if anything before it learns, and once more
    for the gradient of its weights if they learn. Attention is causal: half of the pairs of a row. Logits, and in a
    dense model the last layer's queries, output and feed-forward, are computed at supervised positions alone.
    Of experts the num_experts_per_tok of a token, the shared one, its gate and the router count. MoEFeedForward
    computes all of them, so it does more arithmetic than this.

    Built once from a model whose requires_grad says what learns; what learns later is not seen.
    """

    def __init__(self, model: MiniMindForCausalLM):
        self.per_token = self.per_pair = 0.0  # a pair: a token and one that it looks at
        self.per_supervised = self.per_supervised_pair = 0.0
        self.per_picture = self.per_encoded = 0.0
        flows = _learns(model.model.embed_tokens)  # whether a gradient must flow back through what comes next
        if hasattr(model, "vision_proj"):
            self.per_picture = model.config.image_tokens * _in_a_row(model.vision_proj)
            self.per_encoded = tower_flops(model.vision_encoder, model.config.image_size)
            flows |= _learns(model.vision_proj)
        for layer in model.model.layers:
            last = layer is model.model.layers[-1] and not model.config.use_moe
            flows = self._add_layer(layer, flows, last)
        self.per_supervised += _product(model.lm_head, flows or _learns(model.model.norm))

    def _add_layer(self, layer: DecoderLayer, flows: bool, only_supervised: bool) -> bool:
        """Add a layer; returns whether a gradient must come back through what it gives."""
        attention = layer.self_attn
        flows |= _learns(layer.input_layernorm)
        self.per_token += _product(attention.k_proj, flows) + _product(attention.v_proj, flows)
        at_queries = _product(attention.q_proj, flows)
        before = (attention.q_proj, attention.k_proj, attention.v_proj, attention.q_norm, attention.k_norm)
        flows |= any(_learns(part) for part in before if part is not None)
        pair = 2 * 2 * attention.q_proj.out_features * (3 if flows else 1)  # query x key and weight x value
        at_queries += _product(attention.o_proj, flows)
        flows |= _learns(attention.o_proj) or _learns(layer.post_attention_layernorm)
        at_queries += _feed_forward(layer.mlp, flows)
        if only_supervised:
            self.per_supervised += at_queries
            self.per_supervised_pair += pair
        else:
            self.per_token += at_queries
            self.per_pair += pair
        return flows or _learns(layer.mlp)

    def count(
        self, tokens: float, squared_lengths: float, supervised: float, pictures: float = 0, encoded: float = 0
    ) -> float:
        """FLOP of a step over all its rows, and whatever else is given as totals; padding is for the caller to omit.

        Args:
            tokens: of all rows, pictures' placeholders with them.
            squared_lengths: the sum over rows of length x length. A row of several conversations gives the sum over
                these, as none looks at the others.
            supervised: positions before a label. Labels stand near the end of a row, so each is counted as looking at
                all of a row of mean length.
            pictures: that go through the projector.
            encoded: of which go through the tower; 0 where its outputs are cached.
        """
        mean_row = squared_lengths / tokens if tokens else 0.0
        return (
            self.per_token * tokens
            + self.per_pair * squared_lengths / 2
            + (self.per_supervised + self.per_supervised_pair * mean_row) * supervised
            + self.per_picture * pictures
            + self.per_encoded * encoded
        )


def tower_flops(tower: nn.Module, image_size: int) -> float:
    """FLOP of one picture of image_size pixels a side through the frozen tower, forward alone."""
    config = tower.config
    if not hasattr(config, "num_attention_heads"):  # of convolutions, whose pictures shrink on their way
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            build_tower(config)(torch.zeros(1, 3, image_size, image_size))
        return float(counter.get_total_flops())
    patches, leading = (image_size // config.patch_size) ** 2, leading_tokens(config)
    weights = sum(part.weight.numel() for part in tower.modules() if isinstance(part, nn.Linear))
    pairs = config.num_hidden_layers * 2 * (patches + leading) ** 2 * config.hidden_size  # not causal here
    convolution = sum(part.weight.numel() for part in tower.modules() if isinstance(part, nn.Conv2d))
    return 2.0 * ((patches + leading) * weights + pairs + patches * convolution)


def _in_a_row(projector: nn.Module) -> float:
    """FLOP a token of a projector's layers, one behind the other; no gradient goes on into the tower."""
    total, flows = 0.0, False
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            total += _product(layer, flows)
        flows |= not any(layer.children()) and _learns(layer)
    return total


def _product(linear: nn.Linear, flows: bool) -> float:
    """FLOP a row: forward, the gradient of the input if one must flow back, and that of the weights if they learn."""
    return 2.0 * linear.weight.numel() * (1 + flows + linear.weight.requires_grad)


def _feed_forward(mlp: nn.Module, flows: bool) -> float:
    if isinstance(mlp, MoEFeedForward):
        used = [*mlp.experts[: mlp.top_k], *mlp.shared_experts]
        gates = [mlp.gate] if mlp.shared_expert_gate is None else [mlp.gate, mlp.shared_expert_gate]
        return sum(_product(gate, flows) for gate in gates) + sum(_feed_forward(expert, flows) for expert in used)
    entering = _product(mlp.gate_proj, flows) + _product(mlp.up_proj, flows)
    return entering + _product(mlp.down_proj, flows or _learns(mlp.gate_proj) or _learns(mlp.up_proj))


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
