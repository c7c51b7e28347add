"""The kinds of frozen vision towers, and the pixels that enter them. A new tower is an entry of KINDS.

What a model records of its tower is a dict, VLMConfig.vision_config: the model_type, a key of KINDS (absent in older
files: CLIP's), the sizes that the kind is built from, and what its pictures are made to look like.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig

# OpenAI CLIP's channel statistics, RGB in 0..1 (https://github.com/openai/CLIP)
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_KIND = "clip_vision_model"


@dataclass(frozen=True)
class TowerKind:
    """What tells one kind of tower from another."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    sizes: tuple[str, ...]  # of the config: all that decides which tensors there are and what is done with them
    leading_tokens: int  # of last_hidden_state that are no patches: a class token
    mean: tuple[float, ...] = PIXEL_MEAN  # of the channels in 0..1, where a folder does not say
    std: tuple[float, ...] = PIXEL_STD
    any_size: bool = False  # pictures may have another size than the config's image_size: positions are interpolated
    float32: bool = False  # always: bfloat16 would change what comes out by 5 %
    fixed: dict = field(default_factory=dict)  # settings of the config that we choose


VIT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
             "patch_size", "hidden_act", "layer_norm_eps")  # fmt: skip
DINO_SIZES = ("hidden_size", "mlp_ratio", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
              "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn")  # fmt: skip
DINO_LOOKS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "any_size": True}
KINDS = {
    "clip_vision_model": TowerKind(CLIPVisionConfig, CLIPVisionModel, VIT_SIZES, leading_tokens=1),
    "siglip_vision_model": TowerKind(  # SigLIP2 of a fixed size has the same classes; the pooling head is left out
        SiglipVisionConfig, SiglipVisionModel, VIT_SIZES, leading_tokens=0, mean=(0.5,) * 3, std=(0.5,) * 3,
        fixed={"vision_use_head": False},
    ),
    "dinov2": TowerKind(Dinov2Config, Dinov2Model, DINO_SIZES, leading_tokens=1, **DINO_LOOKS),
    "dinov2_with_registers": TowerKind(  # the registers come on top of leading_tokens
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, (*DINO_SIZES, "num_register_tokens"), leading_tokens=1,
        **DINO_LOOKS,
    ),
    "efficientnet_lite": TowerKind(  # (x - 127) / 128 of 0..255
        EfficientNetLiteConfig, EfficientNetLite, ("image_size", "stem_channels", "stages", "head_channels"),
        leading_tokens=0, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, float32=True,
    ),
}  # fmt: skip


def kind_of(vision_config: dict) -> TowerKind:
    return KINDS[vision_config.get("model_type", DEFAULT_KIND)]


def tower_config(vision_config: dict) -> PreTrainedConfig:
    """The config of the tower's own class."""
    kind = kind_of(vision_config)
    sizes = {name: vision_config[name] for name in kind.sizes if name in vision_config}
    return kind.config_class(**sizes, **kind.fixed)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """An untrained tower whose parameters have the same names under every version of transformers."""
    return unwrap(KINDS[config.model_type].model_class(config))


def unwrap(tower: PreTrainedModel) -> PreTrainedModel:
    return getattr(tower, "vision_model", tower)  # transformers 5.4 wraps two of them once more than 5.24


def leading_tokens(config: PreTrainedConfig) -> int:
    """How many vectors of a tower's last_hidden_state are no patches; they stand first."""
    return KINDS[config.model_type].leading_tokens + getattr(config, "num_register_tokens", 0)


def pixel_statistics(vision_config: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels in 0..1 that a tower was trained with."""
    kind = kind_of(vision_config)
    return vision_config.get("image_mean", kind.mean), vision_config.get("image_std", kind.std)


def normalize_pixels(
    pixels: torch.Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD
) -> torch.Tensor:
    """uint8 [..., 3, height, width] to what a tower was trained on: floats of about mean 0 and deviation 1."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - mean) / std


def encode_patches(tower: PreTrainedModel, pixels: torch.Tensor, before_last_norm: bool = False) -> torch.Tensor:
    """Normalized [pictures, 3, height, width] -> [pictures, patches, width], without class token and registers.

    before_last_norm: of SigLIP, whose last_hidden_state is normed; what stock Llava reads is not.
    """
    if before_last_norm:
        return tower.encoder(inputs_embeds=tower.embeddings(pixels.to(tower.dtype))).last_hidden_state
    exact = KINDS[tower.config.model_type].float32
    with torch.autocast(pixels.device.type, enabled=False) if exact else nullcontext():
        return tower(pixels.to(tower.dtype)).last_hidden_state[:, leading_tokens(tower.config) :]
