"""Our models in classes that every inference engine knows: Llama, Qwen2-MoE and Llava, equal to the last digit."""

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from model.config import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

MAX_NEW_TOKENS = 512  # transformers alone would stop after 20
# GELU is x times the normal distribution up to x: for an x below 2 ** -25 that is 0.5 to the last bit of fp32. Scaling
# by a power of two loses nothing either, as long as the exponent has room: in fp32 and bf16, not in fp16.
SMALL = 2.0**-40


def generation_config(config: MiniMindConfig, **further) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **further,
    )  # fmt: skip


def stock_config(config: MiniMindConfig, vocab_size: int | None = None) -> PreTrainedConfig:
    """LlamaConfig or Qwen2MoeConfig of a decoder, for a vocabulary that may have grown."""
    sizes = {
        "vocab_size": vocab_size or config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters), "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
    }  # fmt: skip
    if not config.use_moe:
        return LlamaConfig(**sizes, attention_bias=False, mlp_bias=False)
    return Qwen2MoeConfig(
        **sizes, qkv_bias=False, num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.num_experts_per_tok > 1, moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=config.intermediate_size,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )  # fmt: skip


def stock_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """The decoder's tensors, named as in LlamaForCausalLM or Qwen2MoeForCausalLM."""
    named = {
        name: value.detach()
        for name, value in model.state_dict().items()
        if name.startswith(("model.", "lm_head.")) and not (model.config.use_moe and ".mlp." in name)
    }
    if not model.config.use_moe:
        return named
    for number, layer in enumerate(model.model.layers):
        prefix, mlp = f"model.layers.{number}.mlp", layer.mlp
        both = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in mlp.experts]
        named[f"{prefix}.gate.weight"] = mlp.gate.weight.detach()
        named[f"{prefix}.experts.gate_up_proj"] = torch.stack(both).detach()
        down = [expert.down_proj.weight for expert in mlp.experts]
        named[f"{prefix}.experts.down_proj"] = torch.stack(down).detach()
        for name in ("gate_proj", "up_proj"):
            named[f"{prefix}.shared_expert.{name}.weight"] = getattr(mlp.shared_experts[0], name).weight.detach()
        # their shared expert has a gate of its own: at zero it halves, and a doubled output undoes that
        named[f"{prefix}.shared_expert.down_proj.weight"] = 2 * mlp.shared_experts[0].down_proj.weight.detach()
        named[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, model.config.hidden_size)
    return named


def stock_decoder(model: MiniMindForCausalLM) -> PreTrainedModel:
    """The decoder alone, as LlamaForCausalLM or Qwen2MoeForCausalLM."""
    stock_class = Qwen2MoeForCausalLM if model.config.use_moe else LlamaForCausalLM
    stock = stock_class(stock_config(model.config))
    stock.load_state_dict(stock_tensors(model), strict=True)
    stock.generation_config = generation_config(model.config)
    return stock.eval()


def stock_llava(model: MiniMindVLM, image_token_id: int, activation: str = "gelu") -> LlavaForConditionalGeneration:
    """The whole model as LlavaForConditionalGeneration, with a token of its own for pictures after the vocabulary.

    That token's embedding is the padding's: as the padding it is never said, whatever the sampling.
    activation: between Llava's two projector layers, where ours has nothing. "linear" says so, but vLLM does not know
        it and MLX applies GELU regardless; "gelu" reaches the same to the bit, see SMALL, but not in float16.
    """
    config = model.config
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**config.vision_config),
            text_config=stock_config(config, image_token_id + 1),
            image_token_index=image_token_id, image_seq_length=config.image_tokens,
            projector_hidden_act=activation, vision_feature_layer=-1, vision_feature_select_strategy="default",
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip
    tensors = {
        name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1): value
        for name, value in stock_tensors(model).items()
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        new_rows = tensors[name][config.pad_token_id].expand(image_token_id + 1 - len(tensors[name]), -1)
        tensors[name] = torch.cat([tensors[name], new_rows])
    projector, prefix = model.vision_proj.vision_proj[0], "model.multi_modal_projector"
    scale, undo = (1.0, 1.0) if activation == "linear" else (SMALL, 2 / SMALL)
    tensors[f"{prefix}.linear_1.weight"] = scale * projector.weight
    tensors[f"{prefix}.linear_1.bias"] = scale * projector.bias
    tensors[f"{prefix}.linear_2.weight"] = undo * torch.eye(config.hidden_size)
    tensors[f"{prefix}.linear_2.bias"] = torch.zeros(config.hidden_size)
    tower = "model.vision_tower."
    if hasattr(llava.model.vision_tower, "vision_model"):  # by version, see build_tower
        tower += "vision_model."
    tensors |= {tower + name: value for name, value in model.vision_encoder.state_dict().items()}
    llava.load_state_dict(tensors, strict=True)
    llava.generation_config = generation_config(config, suppress_tokens=[image_token_id])
    return llava.eval()
