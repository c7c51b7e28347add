"""Our decoder as llama.cpp's text model: which of its architectures computes the same, its facts and its tensors."""

from typing import TYPE_CHECKING

import torch

from model.attention import rope_frequencies
from model.config import YARN_NUMBERS, MiniMindConfig
from model.inference.decoder import pairs_together
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.weights import HEAD
from scripts.export.stock import stock_kind

if TYPE_CHECKING:
    import gguf

DENSE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TURNS_PAIRS = ("llama", "bailingmoe")  # whose RoPE turns neighbours, and not the halves of a head as ours
NEEDS_HEAD = ("qwen2moe", "bailingmoe")  # read no head from tied embeddings
NAMES = {  # ours, within a layer or outside of them, to theirs
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.0.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.0.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.0.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def architecture(config: MiniMindConfig) -> str:
    """The one of llama.cpp's architectures that computes what this decoder does.

    Raises:
        UserError: none does; the message says what is in the way.
    """
    kind = stock_kind(config)
    found, lacks = DENSE.get(kind), []
    if config.use_moe:
        summed = config.weights_sum_to_one or config.num_experts_per_tok == config.num_experts
        if kind == "qwen3_moe":
            found = "qwen3moe"
            lacks = [] if summed else ["experts whose weights do not sum to one (norm_topk_prob false)"]
        elif config.shared_expert_gate:
            found = "qwen2moe"
            lacks = ["experts whose weights sum to one (norm_topk_prob true)"] if summed else []
            if config.head_dim * config.num_attention_heads != config.hidden_size:
                lacks.append(f"heads of {config.head_dim}")
        else:  # the one whose shared expert has no gate
            found = "bailingmoe"
            lacks = ["qkv_bias"] if config.qkv_bias else []
            if config.shared_expert_size % config.intermediate_size:
                lacks.append(
                    f"a shared expert of {config.shared_expert_size}, no multiple of {config.intermediate_size}"
                )
    if config.rope_parameters["rope_type"] == "llama3" and found != "llama":
        lacks.append("Llama 3's RoPE")
    if lacks:
        raise UserError(f"--to gguf: llama.cpp's {found} has no {' and no '.join(lacks)}: --to llm takes this decoder")
    return found


def add_text_facts(writer: "gguf.GGUFWriter", config: MiniMindConfig, name: str) -> None:
    """All that llama.cpp asks of a text model, its tokenizer excepted. Raises UserError over a RoPE that it lacks."""
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, config)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_weights_norm(config.weights_sum_to_one)
        writer.add_expert_weights_scale(1.0)
        if config.shared_expert_size:
            writer.add_expert_shared_feed_forward_length(config.shared_expert_size)
            writer.add_expert_shared_count(max(1, config.shared_expert_size // config.intermediate_size))


def _add_rope(writer: "gguf.GGUFWriter", config: MiniMindConfig) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):  # llama3 is a tensor
        return
    import gguf

    if further := rope.keys() - {"rope_type", "rope_theta", "beta_fast", "beta_slow", *YARN_NUMBERS}:
        raise UserError(f"--to gguf: llama.cpp's YaRN knows no {', '.join(sorted(further))}: --to llm takes them")
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def text_tensors(model: MiniMindForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """The decoder's tensors under llama.cpp's names. kind: what `architecture` found."""
    config, found, experts = model.config, {}, {}
    for name, value in model.state_dict().items():
        if not name.startswith(("model.", "lm_head.")) or (name == HEAD and config.tie_word_embeddings):
            continue
        layer, inner, ending = _parts(name)
        if inner.startswith("mlp.experts."):
            _, _, number, projection = inner.split(".")
            experts.setdefault(f"blk.{layer}.{EXPERT_NAMES[projection]}.weight", {})[int(number)] = value
            continue
        if kind in TURNS_PAIRS and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            value = pairs_together(value, config.head_dim)
        found[f"{layer and f'blk.{layer}.'}{NAMES[inner]}.{ending}"] = value
    for name, by_number in experts.items():
        found[name] = torch.stack([by_number[number] for number in range(config.num_experts)])
    if kind in NEEDS_HEAD:
        found.setdefault("output.weight", found["token_embd.weight"])
    if config.rope_parameters["rope_type"] == "llama3":
        plain = MiniMindConfig(head_dim=config.head_dim, rope_theta=config.rope_parameters["rope_theta"])
        found["rope_freqs.weight"] = rope_frequencies(plain)[0] / rope_frequencies(config)[0]
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """model.layers.3.mlp.up_proj.weight -> 3, mlp.up_proj, weight; the first is empty outside of layers."""
    inner, _, ending = name.rpartition(".")
    if not inner.startswith("model.layers."):
        return "", inner, ending
    _, _, layer, inner = inner.split(".", 3)
    return layer, inner, ending
