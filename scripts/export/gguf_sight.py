"""Our tower and projector as llama.cpp's second file, the mmproj: what it computes for LLaVA's models."""

from typing import TYPE_CHECKING

import torch
from PIL import Image

from model.config import VLMConfig
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.projectors import MLPProjector, Projector
from model.vision_encoder import DEFAULT_KIND, pixel_statistics, tower_config
from scripts.export.llama_cpp import FILTER, FILTERS
from scripts.export.stock import own_ways

if TYPE_CHECKING:
    import gguf

TOWERS = (DEFAULT_KIND, "siglip_vision_model")
# transformers' activations to the fact that asks for them; None: what llama.cpp takes where nothing is said.
ACTIVATIONS = {"quick_gelu": None, "gelu": "clip.use_gelu", "gelu_pytorch_tanh": "clip.use_gelu",
               "gelu_new": "clip.use_gelu", "silu": "clip.use_silu"}  # fmt: skip
POSITIONS = "v.position_embd.weight"
NAMES = {  # of the tower's tensors, within a layer or outside of them
    "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln", "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
SHARPENED = 2.0**16


def check_sight(config: VLMConfig) -> None:
    """Raises UserError where llama.cpp sees in another way than this model."""
    kind = config.vision_config.get("model_type", DEFAULT_KIND)
    activation = tower_config(config.vision_config).to_dict().get("hidden_act", "quick_gelu")
    reasons = {
        f"a {kind} tower": kind not in TOWERS,
        f"a tower with the activation {activation}": kind in TOWERS and activation not in ACTIVATIONS,
        f"the projector {config.projector}": config.projector not in ("linear", "mlp"),
        f"pictures scaled by {_filter(config)}": _filter(config) not in FILTERS,
        **own_ways(config),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise UserError(
            f"--to gguf: llama.cpp's LLaVA has no place for {' and '.join(found)}: --to transformers takes this model "
            "with its code"
        )


def add_sight_facts(writer: "gguf.GGUFWriter", config: VLMConfig, name: str) -> None:
    """What llama.cpp asks of a tower. config: one that check_sight takes."""
    tower = tower_config(config.vision_config)
    mean, std = pixel_statistics(config.vision_config)
    writer.add_name(f"{name}, vision")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_projection_dim(config.hidden_size)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean(list(mean))
    writer.add_vision_image_std(list(std))
    writer.add_string(FILTER, _filter(config))
    writer.add_array("clip.vision.feature_layer", [tower.num_hidden_layers])  # unsaid it reads the last but one
    if asked := ACTIVATIONS[tower.hidden_act]:
        writer.add_bool(asked, True)


def _filter(config: VLMConfig) -> str:
    return Image.Resampling(config.resample).name.lower()


def sight_tensors(model: MiniMindVLM) -> dict[str, torch.Tensor]:
    """Tower and projector under llama.cpp's names, positions in the order of the tower's own tokens.

    What stands behind the last layer is left out: a last norm, which Llava's patches do not pass.
    """
    found = {}
    for name, value in model.vision_encoder.state_dict().items():
        if name.startswith("post_layernorm.") or name.startswith("head."):
            continue
        if name == "embeddings.class_embedding":
            found["v.class_embd"] = value
            continue
        inner, _, ending = name.rpartition(".")
        if inner.startswith("encoder.layers."):
            _, _, layer, inner = inner.split(".", 3)
            found[f"v.blk.{layer}.{NAMES[inner]}.{ending}"] = value
        else:
            found[f"{NAMES[inner]}.{ending}"] = value
    return found | _projector_tensors(model.vision_proj)


def _projector_tensors(projector: Projector) -> dict[str, torch.Tensor]:
    """Two layers with a GELU between them. One layer is exact as x = gelu(x) - gelu(-x).

    Its numbers are made large on the way: on a CPU llama.cpp looks GELU up in a table of half precision, up to 10, and
    beyond that it is x or 0 to the last bit.
    """
    if isinstance(projector, MLPProjector):
        return {f"mm.{layer}.{part}": getattr(getattr(projector, name), part)
                for layer, name in ((0, "linear_1"), (2, "linear_2")) for part in ("weight", "bias")}  # fmt: skip
    linear = projector.vision_proj[0]
    same = torch.eye(linear.out_features) / SHARPENED
    return {
        "mm.0.weight": SHARPENED * torch.cat([linear.weight, -linear.weight]),
        "mm.0.bias": SHARPENED * torch.cat([linear.bias, -linear.bias]),
        "mm.2.weight": torch.cat([same, -same], dim=1),
        "mm.2.bias": torch.zeros(linear.out_features),
    }
