"""Tiny towers of every kind, with weights that show every mistake, saved as transformers saves them."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from helpers.models import IMAGE_SIZE, VISION_SIZES
from model.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig

TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DINO = {name: size for name, size in VISION_SIZES.items() if name != "intermediate_size"}
LITE = {"image_size": IMAGE_SIZE, "stem_channels": 4, "head_channels": 10, "stages": (
    (1, 3, 1, 1, 4), (2, 3, 2, 2, 4), (1, 5, 2, 2, 4), (1, 3, 2, 2, 4), (1, 5, 1, 2, 6), (1, 5, 2, 2, 8),
    (1, 3, 1, 2, 8),
)}  # fmt: skip
MAKERS = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION_SIZES, projection_dim=8)),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION_SIZES)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION_SIZES)),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO)),
    "efficientnet_lite": lambda: EfficientNetLite(EfficientNetLiteConfig(**LITE)),
}


def make_tower(kind: str, folder: Path, seed: int = 4, **looks) -> PreTrainedModel:
    """The whole model that was saved, in eval mode. looks: what preprocessor_config.json says, none without any."""
    model = MAKERS[kind]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                ones = (
                    "norm" in name
                    or name.endswith(("variance", "lambda1"))
                    or value.ndim == 1
                    and name.endswith("weight")
                )
                value.copy_(
                    1 + 0.2 * noise.abs() if ones else noise / max(value[0].numel() if value.ndim else 1, 4) ** 0.5
                )
    model.save_pretrained(folder)
    if looks:
        (folder / "preprocessor_config.json").write_text(json.dumps(looks))
    return model


def own_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden state of the model's vision half, by its own class."""
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixels).last_hidden_state
