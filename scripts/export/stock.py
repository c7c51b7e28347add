"""Our models in classes that every inference engine knows: Llama's and Qwen's, and Llava; equal to the last digit."""

import torch
from transformers import GenerationConfig, LlavaConfig, PreTrainedConfig

from model.base_folder import CONFIGS
from model.config import MiniMindConfig, VLMConfig
from model.inference.llava_projector import projector_tensors
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.vision_encoder import DEFAULT_KIND, tower_config

MAX_NEW_TOKENS = 512  # transformers alone would stop after 20
SELECTED = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # Llava: without class token, or all


def generation_config(config: MiniMindConfig, **further) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **further,
    )  # fmt: skip


def stock_config(config: MiniMindConfig, vocab_size: int | None = None) -> PreTrainedConfig:
    """The config of the class that holds a decoder (stock_kind), for a vocabulary that may have grown."""
    kind = stock_kind(config)
    settings = {
        "vocab_size": vocab_size or config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters), "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
    }  # fmt: skip
    if kind not in ("qwen2", "qwen2_moe"):
        settings |= {"head_dim": config.head_dim, "attention_bias": config.qkv_bias}
    elif config.head_dim * config.num_attention_heads != config.hidden_size:
        settings["head_dim"] = config.head_dim  # these derive it where nothing is said
    if kind == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if config.use_moe:
        settings |= {
            "num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.weights_sum_to_one, "moe_intermediate_size": config.intermediate_size,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }  # fmt: skip
    if kind == "qwen2_moe":
        settings |= {"qkv_bias": True, "shared_expert_intermediate_size": config.shared_expert_size}
    stock = CONFIGS[kind](**settings)
    stock.architectures = [type(stock).__name__.replace("Config", "ForCausalLM")]
    return stock


def stock_kind(config: MiniMindConfig) -> str:
    """The model_type of the class of transformers that holds a decoder exactly: one of CONFIGS.

    Raises:
        UserError: none does; the message says what is in the way.
    """
    normed = config.qk_norm
    if config.use_moe:
        kinds = ("qwen3_moe",) if normed else ("qwen2_moe",)
    else:
        kinds = ("qwen3",) if normed else ("llama", "qwen2")
    lacking = {kind: _what_it_lacks(kind, config) for kind in kinds}
    for kind, lacks in lacking.items():
        if not lacks:
            return kind
    said = "; ".join(f"{kind} has no {' and no '.join(lacks)}" for kind, lacks in lacking.items())
    raise UserError(
        f"none of transformers' own classes holds this decoder: {said}. Export a model that sees with --to "
        "transformers, which ships the code it needs"
    )


def _what_it_lacks(kind: str, config: MiniMindConfig) -> list[str]:
    """Which settings of a decoder a class of transformers has no place for."""
    biases = (config.qkv_bias, config.output_bias)
    possible = {"qwen2": [(True, False)], "qwen2_moe": [(True, False), (False, False)]}
    lacks = []
    if biases not in possible.get(kind, [(True, True), (False, False)]):
        lacks.append(f"qkv_bias {biases[0]} beside output_bias {biases[1]}")
    if config.mlp_bias and kind != "llama":
        lacks.append("mlp_bias")
    if kind == "qwen2_moe" and not config.shared_expert_size:
        lacks.append("experts without a shared one")
    if kind == "qwen3_moe" and config.shared_expert_size:
        lacks.append("shared expert")
    if kind == "llama" and config.hidden_size % config.num_attention_heads:
        lacks.append(f"hidden_size {config.hidden_size} for {config.num_attention_heads} heads, no multiple of these")
    return lacks


def decoder_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """The decoder's tensors as files of its stock class name them, a tied head left out.

    The names of published files, which every version of transformers and every other engine reads; what save_pretrained
    writes, and what models call their parameters in memory, depends on the version.
    """
    named, config = {}, model.config
    lacks_gate = config.use_moe and config.shared_expert_size and not config.shared_expert_gate
    lacks_bias = stock_kind(config) == "qwen2_moe" and not config.qkv_bias
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or not name.startswith(("model.", "lm_head.")):
            continue
        name = name.replace(".mlp.shared_experts.0.", ".mlp.shared_expert.")
        # their shared expert has a gate of its own: at zero it halves, and a doubled output undoes that
        doubled = lacks_gate and name.endswith(".shared_expert.down_proj.weight")
        named[name] = 2 * value if doubled else value
        if lacks_gate and name.endswith(".mlp.gate.weight"):
            named[name.replace(".gate.", ".shared_expert_gate.")] = torch.zeros(1, config.hidden_size)
        # as in Qwen's own files: vLLM always has these biases, and without them adds whatever its memory held
        if lacks_bias and name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            named[name.replace(".weight", ".bias")] = value.new_zeros(len(value))
    return named


def own_ways(config: VLMConfig) -> dict[str, bool]:
    """What our code may do with a picture and no stock format knows, each with whether this model does it."""
    return {
        f"patches folded into {config.image_tokens} tokens": config.fold != (1, 1),
        f"pictures cut into up to {config.tiles} tiles": bool(config.tiles),
    }


def check_llava(config: VLMConfig) -> None:
    """Raises UserError where transformers' Llava sees in another way than this model."""
    kind = config.vision_config.get("model_type", DEFAULT_KIND)
    reasons = {
        f"a {kind} tower, whose features Llava does not take as they are": kind not in SELECTED,
        f"the projector {config.projector}, which begins with a norm": config.projector not in ("linear", "mlp"),
        **own_ways(config),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise UserError(f"Llava cannot hold {' and '.join(found)}: --to transformers takes this model with its code")


def llava_config(model: MiniMindVLM, image_token_id: int, activation: str = "gelu") -> LlavaConfig:
    """The model as LlavaForConditionalGeneration, with a token of its own for pictures.

    activation: between Llava's two projector layers, where `linear` has nothing: see model.inference.llava_projector.

    Raises:
        UserError: the tower, the projector or the decoder is none that it can hold.
    """
    config = model.config
    check_llava(config)
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], vision_config=tower_config(config.vision_config),
        text_config=stock_config(config, max(config.vocab_size, image_token_id + 1)),
        image_token_index=image_token_id, image_seq_length=config.image_tokens, projector_hidden_act=activation,
        vision_feature_layer=-1, vision_feature_select_strategy=selected(config),
        tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip


def selected(config: VLMConfig) -> str:
    """Llava's word for the tokens of the tower that are patches."""
    return SELECTED[config.vision_config.get("model_type", DEFAULT_KIND)]


def llava_tensors(model: MiniMindVLM, config: LlavaConfig) -> dict[str, torch.Tensor]:
    """The tensors that belong to llava_config, as published Llava files name them.

    The embedding of the token for pictures is the padding's: like padding it is never generated, however one samples.
    """
    tensors = {f"language_model.{name}": value for name, value in decoder_tensors(model).items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            new_rows = config.text_config.vocab_size - len(tensors[name])
            padding = tensors[name][model.config.pad_token_id or 0].expand(new_rows, -1)
            tensors[name] = torch.cat([tensors[name], padding])
    projector = projector_tensors(model.vision_proj, config.projector_hidden_act)
    tensors |= {f"multi_modal_projector.{name}": value for name, value in projector.items()}
    tower = model.vision_encoder.state_dict()
    return tensors | {f"vision_tower.vision_model.{name}": value for name, value in tower.items()}
