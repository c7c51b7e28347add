"""Our models in classes that every inference engine knows: Llama, Qwen2-MoE and Llava, equal to the last digit."""

import torch
from transformers import GenerationConfig, LlamaConfig, LlavaConfig, PreTrainedConfig, Qwen2MoeConfig

from model.config import MiniMindConfig
from model.inference.llava_projector import projector_tensors
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.vision_encoder import tower_config

MAX_NEW_TOKENS = 512  # transformers alone would stop after 20


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


def decoder_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """The decoder's tensors as files of Llama or Qwen2-MoE name them, a tied head left out.

    The names of published files, which every version of transformers and every other engine reads; what save_pretrained
    writes, and what models call their parameters in memory, depends on the version.
    """
    named = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings or not name.startswith(("model.", "lm_head.")):
            continue
        name = name.replace(".mlp.shared_experts.0.", ".mlp.shared_expert.")
        # their shared expert has a gate of its own: at zero it halves, and a doubled output undoes that
        named[name] = 2 * value if name.endswith(".shared_expert.down_proj.weight") else value
        if name.endswith(".mlp.gate.weight"):
            named[name.replace(".gate.", ".shared_expert_gate.")] = torch.zeros(1, model.config.hidden_size)
    return named


def llava_config(model: MiniMindVLM, image_token_id: int, activation: str = "gelu") -> LlavaConfig:
    """The model as LlavaForConditionalGeneration, with a token of its own for pictures after the vocabulary.

    activation: between Llava's two projector layers, where ours has nothing: see model.inference.llava_projector.
    """
    return LlavaConfig(
        vision_config=tower_config(model.config.vision_config),
        text_config=stock_config(model.config, image_token_id + 1),
        image_token_index=image_token_id, image_seq_length=model.config.image_tokens,
        projector_hidden_act=activation, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=model.config.tie_word_embeddings,
    )  # fmt: skip


def llava_tensors(model: MiniMindVLM, config: LlavaConfig) -> dict[str, torch.Tensor]:
    """The tensors that belong to llava_config, as published Llava files name them.

    The embedding of the token for pictures is the padding's: like padding it is never generated, however one samples.
    """
    tensors = {f"language_model.{name}": value for name, value in decoder_tensors(model).items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            new_rows = config.text_config.vocab_size - len(tensors[name])
            padding = tensors[name][model.config.pad_token_id].expand(new_rows, -1)
            tensors[name] = torch.cat([tensors[name], padding])
    projector = projector_tensors(model.vision_proj.vision_proj[0], config.projector_hidden_act)
    tensors |= {f"multi_modal_projector.{name}": value for name, value in projector.items()}
    tower = model.vision_encoder.state_dict()
    return tensors | {f"vision_tower.vision_model.{name}": value for name, value in tower.items()}
