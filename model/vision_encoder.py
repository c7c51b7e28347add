"""The frozen CLIP tower and the pixels that enter it."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

# OpenAI CLIP's channel statistics, RGB in 0..1 (https://github.com/openai/CLIP)
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, height, width] to what CLIP was trained on: floats of mean 0 and deviation 1 in each channel."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels.float() / 255 - mean) / std


def build_tower(config: CLIPVisionConfig) -> PreTrainedModel:
    """An untrained CLIP vision tower whose parameters have the same names under every version of transformers."""
    return unwrap(CLIPVisionModel(config))


def unwrap(tower: CLIPVisionModel) -> PreTrainedModel:
    return getattr(tower, "vision_model", tower)  # transformers 5.4 wraps the tower once more than 5.24
