"""What a run must have in common with its checkpoint to go on from it: flags, data, tokenizer, frozen weights."""

import hashlib
import json
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.utils.data import Subset

from model.processing import VLMProcessor
from model.vision_encoder import file_sha256
from trainer.config import StageConfig

# Flags that change where or how fast a run goes, not what is learnt; how a step is split has its own rule (resplit.py).
# Paths are free because what lies there is compared by content.
FREE_FLAGS = frozenset((
    "data_path", "images_path", "val_path", "save_dir", "from_weight", "init_embeddings", "from_resume", "vision_model",
    "batch_size", "accumulation_steps", "device", "num_workers", "log_interval", "save_interval", "keep_last",
    "allow_data_change", "strict_data", "max_bad_share", "use_wandb", "wandb_project", "batch_tokens", "profile",
))  # fmt: skip
SAMPLED_PICTURES = 2000  # samples, evenly chosen, whose pictures are part of the data's fingerprint


def binding_flags(config: StageConfig) -> dict:
    """The flags that may not change within a run, as JSON gives them back."""
    flags = {name: value for name, value in vars(config).items() if name not in FREE_FLAGS}
    return json.loads(json.dumps(flags))


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def data_fingerprint(data: Subset) -> str:
    """Of the training samples as they are learnt from: their token ids, which are trained, and their pictures.

    Every token counts; of the pictures those of up to SAMPLED_PICTURES samples do, with every byte.
    """
    dataset, digest = data.dataset, hashlib.sha256()
    for array in (dataset.ids, dataset.trained, dataset.branch, dataset.offsets):
        digest.update(array.tobytes())
    digest.update(torch.as_tensor(list(data.indices), dtype=torch.int64).numpy().tobytes())
    stride = -(-len(data.indices) // SAMPLED_PICTURES)
    for index in list(data.indices)[::stride]:
        for picture in dataset.samples[dataset.kept[index]].pictures:
            content = file_sha256(picture) if isinstance(picture, Path) else hashlib.sha256(picture).hexdigest()
            digest.update(content.encode())
    return digest.hexdigest()


def frozen_fingerprint(model: nn.Module) -> str:
    """Of the weights that a checkpoint does not hold: the tower's as its file says, the decoder's one by one."""
    digest = hashlib.sha256(str(getattr(model.config, "vision_sha256", None)).encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.startswith("vision_encoder."):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(config: StageConfig, model: nn.Module, processor: VLMProcessor, data: Subset) -> dict:
    """Everything that a checkpoint compares before a run goes on from it, most telling first."""
    return {
        "stage": config.name,
        "tokenizer": processor.fingerprint(),
        "frozen weights": frozen_fingerprint(model),
        "data": data_fingerprint(data),
        "samples": len(data),
        **{f"--{name}": value for name, value in binding_flags(config).items()},
    }
