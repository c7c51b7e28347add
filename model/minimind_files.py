"""MiniMind's own files: what a .pth tells by its tensors, and what the config.json of its folders says beside them."""

from collections.abc import Mapping
from pathlib import Path

import torch

from model.messages import UserError

EMBEDDINGS = "model.embed_tokens.weight"
TOLD = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
TOLD_OF_EXPERTS = ("num_experts_per_tok", "router_aux_loss_coef")


def infer_config(
    tensors: Mapping[str, torch.Tensor], num_attention_heads: int = 8, path: str | Path = "this file"
) -> dict:
    """Sizes of a MiniMind .pth from its tensors, as arguments of MiniMindConfig.

    num_attention_heads: what MiniMind2's do not tell. MiniMind-3's have norms for queries and keys, which do, and come
    with that generation's settings: an epsilon of its own, experts one a token and weighed by 1.
    """
    layer = "model.layers.0"
    use_moe = f"{layer}.mlp.gate.weight" in tensors
    try:
        embeddings, keys = tensors[EMBEDDINGS], tensors[f"{layer}.self_attn.k_proj.weight"]
        feed_forward = tensors[f"{layer}.mlp.{'experts.0.' if use_moe else ''}gate_proj.weight"]
    except KeyError as error:
        raise UserError(f"{path} is no MiniMind decoder: {error} is missing") from error
    hidden_size = embeddings.shape[1]
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": len(keys) * num_attention_heads // hidden_size,
        "vocab_size": len(embeddings),
        "intermediate_size": len(feed_forward),
        "use_moe": use_moe,
    }
    if use_moe:
        shared = tensors.get(f"{layer}.mlp.shared_experts.0.gate_proj.weight", ())
        sizes |= {"num_experts": len(tensors[f"{layer}.mlp.gate.weight"])}
        sizes |= {} if len(shared) == len(feed_forward) else {"shared_expert_intermediate_size": len(shared)}
    if (norm := tensors.get(f"{layer}.self_attn.q_norm.weight")) is None:
        return sizes
    heads, key_heads = (len(tensors[f"{layer}.self_attn.{part}_proj.weight"]) // len(norm) for part in "qk")
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": len(norm)}
    sizes |= {"num_experts_per_tok": 1, "norm_topk_prob": True} if use_moe else {}
    return {**sizes, "qk_norm": True, "rms_norm_eps": 1e-6}


def is_minimind(facts: dict) -> bool:
    """Whether a config.json is one of MiniMind's own conversion; our exports say `minimind`, too, but never that."""
    return facts.get("model_type") == "minimind-v" or facts.get("model_type") == "minimind" and "flash_attn" in facts


def folder_arguments(facts: dict, tensors: Mapping[str, torch.Tensor], path: Path) -> dict:
    """Arguments of MiniMindConfig for a folder of MiniMind's: sizes by its tensors, the rest by its config.json.

    Raises:
        UserError: it asks for what our decoder does not do, or its tensors are none of a MiniMind.
    """
    wrong = [f"{name} {facts[name]!r}" for name, usual in (("hidden_act", "silu"), ("rope_scaling", None))
             if facts.get(name, usual) != usual]  # fmt: skip
    if wrong:
        raise UserError(f"{path} asks for {' and '.join(wrong)}: this decoder does not do that. Take another base")
    arguments = infer_config(tensors, facts.get("num_attention_heads", 8), path)
    told = (*TOLD, *TOLD_OF_EXPERTS) if arguments["use_moe"] else TOLD
    arguments |= {name: facts[name] for name in told if name in facts}
    if arguments["use_moe"] and arguments.get("qk_norm"):  # MiniMind2's never divides the weight of a single expert
        arguments["norm_topk_prob"] = facts.get("norm_topk_prob", True)
    theta = facts.get("rope_theta") or (facts.get("rope_parameters") or {}).get("rope_theta")
    return {**arguments, **({"rope_theta": float(theta)} if theta else {})}
