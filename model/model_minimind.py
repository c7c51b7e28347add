"""The decoder: layers of attention (model.attention) and a feed-forward or experts (model.layers), and the head.

Dense it is exactly Llama, with experts exactly Qwen2-MoE, or as its config says Qwen2, Qwen3 or Qwen3-MoE (see
MiniMindConfig). Parameters are named as MiniMind2's.
"""

from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from model.attention import Attention, RotaryEmbedding, branch_mask, causal_mask, gather_positions, rope_frequencies
from model.config import IGNORE_INDEX, MiniMindConfig
from model.layers import FeedForward, MoEFeedForward, RMSNorm, product_dtype
from model.loss import summed_cross_entropy
from model.messages import UserError

# What the installed transformers calls the cache: in what a model returns, and in what generate() hands to it.
CACHE_NAME = {"cache", "past_key_values"}.intersection(field.name for field in fields(MoeCausalLMOutputWithPast)).pop()

OF_EMBED = ("patch_features", "pictures_a_row")  # further arguments of MiniMindVLM.embed; a bare decoder ignores them
NOT_OFFERED = {  # arguments of transformers' own models, and what to do without them
    "output_attentions": "attention keeps no weights",
    "output_router_logits": "aux_loss is the balance loss already",
    "inputs_embeds": "it takes input_ids, and pictures as pixel_values with image_mask",
}


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and with a residual connection around it."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        cache: Cache | None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [batch, seq, hidden] -> the same shape, and the balance loss of each sequence (None: dense).

        positions: [batch, n], the only ones whose output [batch, n, hidden] is wanted; they still see all others.
        """
        mixed = self.self_attn(self.input_layernorm(x), rotary, mask, cache, positions)
        x = (x if positions is None else gather_positions(x, positions)) + self.dropout(mixed)
        normed, balance_loss = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoEFeedForward):
            mixed, balance_loss = self.mlp(normed, token_mask)
        else:
            mixed = self.mlp(normed)
        return x + self.dropout(mixed), balance_loss


class MiniMindModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False  # as transformers calls it, whose Trainer sets it

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        token_mask: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        hidden_states: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """inputs_embeds [batch, seq, hidden] -> the same shape, and the balance loss of each sequence (None: dense).

        attention_mask: None means that padding, if any, stands on the right, where causal attention never looks.
        token_mask: [batch, seq], 0 at padding, for the balance loss alone.
        branches: [batch, 2, seq], of rows that hold several conversations (see model.attention.branch_mask); instead of
            attention_mask and cache, and with position_ids.
        positions: [batch, n], the only ones whose hidden states [batch, n, hidden] are wanted; the last layer is then
            computed there alone (an expert layer everywhere, because its balance loss counts every token).
        hidden_states: a list to fill with what enters each layer, and then what comes out of the last norm.
        """
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        cached = cache.get_seq_length() if cache is not None else 0  # tokens
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + cached)[None]  # [1, seq]
        if branches is None:
            mask = causal_mask(attention_mask, cached, length, device)
        elif attention_mask is not None or cache is not None:
            raise ValueError("branches say by themselves where a token looks: leave attention_mask and the cache out")
        else:
            mask = branch_mask(branches)
        rotary = self.rotary(position_ids, product_dtype(inputs_embeds))
        x, balance_losses = inputs_embeds, []
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            wanted = positions if layer is self.layers[-1] and not self.config.use_moe else None
            inputs = (x, rotary, mask, token_mask, cache, wanted)
            if self.gradient_checkpointing and self.training and cache is None:  # a cache would be filled twice
                drops = self.config.dropout > 0  # what was drawn for it must be drawn again
                x, balance_loss = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=drops)
            else:
                x, balance_loss = layer(*inputs)
            if balance_loss is not None:
                balance_losses.append(balance_loss.to(device))  # layers may stand on several
        if positions is not None and self.config.use_moe:
            x = gather_positions(x, positions)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x, torch.stack(balance_losses).sum(0) if balance_losses else None


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head, tied to the embeddings."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RotaryEmbedding):  # from_pretrained leaves what is in no file unset
            module.frequencies.copy_(rope_frequencies(module.config)[0])

    def embed(self, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
        """[batch, seq] -> [batch, seq, hidden]; the place where MiniMindVLM puts its pictures."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        supervised_tokens: torch.Tensor | int | None = None,
        sequences: int | None = None,
        branches: torch.Tensor | None = None,
        loss_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        image_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **inputs,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Logits of the next token, or with labels the loss.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, seq], 0 at padding; may be left out when padding stands on the right.
            labels: [batch, seq], input_ids where the token is to be learnt and IGNORE_INDEX elsewhere.
            logits_to_keep: the last so many positions, or an index of positions; None: all without labels, none with.
            supervised_tokens: the number of labelled tokens by which to divide the loss; None: those of this batch. A
                step of several micro-batches or ranks gives that of all of them: every token weighs the same.
            sequences: likewise for the balance loss, which is a mean over sequences.
            branches: [batch, 2, seq], with position_ids; see MiniMindModel.
            loss_positions: [batch, n], the positions before a label, rows filled up with their last position; without
                them they are searched in the labels, for which the host must wait for the GPU.
            past_key_values, cache: the same under its name before transformers 5.24 and since.
            return_dict, output_hidden_states, num_items_in_batch: as in transformers, whose Trainer calls
                supervised_tokens by the last of these names.
            image_mask, pixel_values: for `embed`, and here by name because that Trainer drops what it does not find.
            inputs: further ones of `embed` (OF_EMBED).

        Returns with labels the loss to minimise, cross-entropy and balance loss; in aux_loss the balance loss alone,
        weighted (None: dense); logits [batch, kept positions, vocabulary]; the cache, where there is one; hidden_states
        if asked for: what enters each layer, and what enters the head.

        Raises:
            UserError: an argument of transformers' models that this one does not offer.
        """
        refuse_others(inputs)
        cache = past_key_values if cache is None else cache
        supervised_tokens = num_items_in_batch if supervised_tokens is None else supervised_tokens
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [] if output_hidden_states else None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        token_mask = input_ids != self.config.pad_token_id if labels is not None and self.config.use_moe else None
        if labels is not None and loss_positions is None:
            loss_positions = positions_before(labels)
        positions = loss_positions if labels is not None and logits_to_keep is None and states is None else None
        embeddings = self.embed(input_ids, image_mask=image_mask, pixel_values=pixel_values, **inputs)
        hidden, balance_losses = self.model(
            embeddings, attention_mask, position_ids, cache, token_mask, branches, positions, states
        )
        loss = aux_loss = logits = None
        if labels is not None:
            at_labels = hidden if positions is not None else gather_positions(hidden, loss_positions)
            loss = self._cross_entropy(at_labels, labels, loss_positions, supervised_tokens)
            if balance_losses is not None:
                aux_loss = self.config.router_aux_loss_coef * balance_losses.sum() / (sequences or len(labels))
                loss = loss + aux_loss
        if labels is None or logits_to_keep is not None:
            kept = logits_to_keep if torch.is_tensor(logits_to_keep) else slice(-(logits_to_keep or 0), None)
            logits = self.lm_head(hidden[:, kept])
        output = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, hidden_states=None if states is None else tuple(states),
            **{CACHE_NAME: cache},
        )  # fmt: skip
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        """As transformers does, without the `cache_position` that 5.4 adds: the cache itself knows where a token goes.

        With use_cache=False a given cache is left alone; transformers would append everything to it once more.
        """
        if kwargs.get("use_cache") is False:
            kwargs = {name: value for name, value in kwargs.items() if name not in (CACHE_NAME, "next_sequence_length")}
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.shape[1] != input_ids.shape[1]:
                raise UserError(
                    f"use_cache=False reads everything again: attention_mask has {mask.shape[1]} columns, so give as "
                    f"many input_ids, not {input_ids.shape[1]}"
                )
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    def _cross_entropy(
        self, hidden: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, supervised_tokens: int | None
    ) -> torch.Tensor:
        """The loss of the labels, from the hidden states [batch, n, hidden] before them; no other logits are needed."""
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX).gather(1, positions + 1).to(hidden.device)
        if hidden.device.type == "cpu":  # skip the filling; on a GPU the host would have to wait for the count
            hidden, targets = hidden[targets != IGNORE_INDEX], targets[targets != IGNORE_INDEX]
        count = (targets != IGNORE_INDEX).sum() if supervised_tokens is None else torch.as_tensor(supervised_tokens)
        loss = summed_cross_entropy(self.lm_head, hidden, targets, product_dtype(hidden))
        if count.device.type != "cpu":  # where layers stand on several devices; a CPU scalar may divide any tensor
            count = count.to(loss.device)
        return loss / count.clamp(1)


def refuse_others(inputs: dict) -> None:
    """Drop arguments that are None or False, and refuse by name what `embed` does not take; see forward."""
    for name in [name for name, value in inputs.items() if name not in OF_EMBED]:
        value = inputs.pop(name)
        if value is not None and value is not False:
            why = NOT_OFFERED.get(name, "forward does not know it")
            raise UserError(f"{name} is not offered by this model: {why}. Leave it out")


def positions_before(labels: torch.Tensor) -> torch.Tensor:
    """labels [batch, seq] -> the positions before each label, [batch, most in a row], filled up with seq - 1."""
    supervised = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    most = int(supervised.sum(1).max())
    positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return positions.masked_fill(~supervised, labels.shape[1] - 1).sort(1).values[:, :most]
