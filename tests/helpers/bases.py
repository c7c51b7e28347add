"""Tiny decoders of transformers' own classes with weights that show every mistake, and their folders."""

import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.models import LLAMA3

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = {**EXPERTS, "shared_expert_intermediate_size": 40}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
BASES = {  # name: model_type, and what is not as in SIZES
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama attention_bias": ("llama", {"attention_bias": True}),
    "llama mlp_bias": ("llama", {"mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 attention_bias": ("qwen3", {"attention_bias": True}),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe no bias": ("qwen2_moe", {**QWEN2_MOE, "qkv_bias": False, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    "qwen3_moe normed": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": True}),
}


@torch.no_grad()
def stock_model(name: str, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    """One of BASES."""
    kind, changes = BASES[name]
    sizes = {**SIZES, **changes, "vocab_size": vocab_size}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter_name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in parameter_name:
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1 or "embed_tokens" in parameter_name:
            parameter.copy_(0.4 * noise)
        else:
            parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[-1]))
    return model


def save_base(name: str, folder: Path, vocabulary: int = VOCABULARY, **changes) -> PreTrainedModel:
    """Saves one of BASES as transformers does, and changes its config.json."""
    model = stock_model(name, vocabulary)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def some_ids(rows: int = 2, length: int = 90) -> torch.Tensor:
    """Long enough that LLAMA3's and LINEAR's positions differ from plain ones; without the special ids."""
    return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))
