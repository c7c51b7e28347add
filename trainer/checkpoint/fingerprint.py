"""What a run must have in common with its checkpoint to go on from it: flags, data, tokenizer, frozen weights."""

import hashlib
import json
import socket
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Subset

from model.files import file_sha256
from model.messages import UserError
from model.processing import VLMProcessor
from model.weights import decoder_arguments
from trainer.checkpoint.files import differences
from trainer.config import OPEN, StageConfig
from trainer.distributed import Runtime
from trainer.mix import weights_of

# Flags that change where or how fast a run goes, not what is learnt; how a step is split has its own rule (order.py).
# Paths are free because what lies there is compared by content.
FREE_FLAGS = frozenset((
    "data_path", "images_path", "val_path", "save_dir", "from_weight", "init_embeddings", "from_resume", "vision_model",
    "batch_size", "accumulation_steps", "batch_tokens", "device", "shard", "num_workers", "log_interval",
    "save_interval", "keep_last", "allow_data_change", "strict_data", "max_bad_share", "use_wandb", "wandb_project",
    "profile", "checkpoint_activations", "data_format", "max_samples", "min_rating", "follow_links", "max_megapixels",
    "eval_tasks", "eval_interval", "eval_samples",
))  # fmt: skip
# Of these the flags that ranks must share all the same, because they decide when ranks talk to each other.
SAME_ON_RANKS = ("batch_size", "accumulation_steps", "batch_tokens", "from_resume", "log_interval", "save_interval",
                 "eval_interval", "shard")  # fmt: skip
# No part of it where open, so that older checkpoints have the same.
LATER_FLAGS = ("projector", "image_tokens", "tiles", "frames", "rope_theta", "yarn_factor")
SHOWN = 5  # differences a refusal lists
SAMPLED_PICTURES = 2000  # rows, evenly chosen, whose pictures are part of the data's fingerprint


def binding_flags(config: StageConfig) -> dict:
    """The flags that may not change within a run, as JSON gives them back."""
    flags = {name: value for name, value in vars(config).items() if name not in FREE_FLAGS}
    flags = {name: value for name, value in flags.items() if value or name not in LATER_FLAGS}
    return json.loads(json.dumps(flags))


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def data_fingerprint(data: Subset) -> str:
    """Of the training samples as they are learnt from: their token ids, which are trained, and their pictures.

    Every token counts; of the pictures those of up to SAMPLED_PICTURES rows do, with every byte.
    """
    dataset, digest = data.dataset, hashlib.sha256()
    for array in (dataset.ids, dataset.trained, dataset.branch, dataset.offsets):
        digest.update(array.data)
    digest.update(np.asarray(data.indices, np.int64).data)
    stride = -(-len(data.indices) // SAMPLED_PICTURES)
    for index in data.indices[::stride]:
        for picture in dataset.pictured(index).pictures:
            content = file_sha256(picture) if isinstance(picture, Path) else hashlib.sha256(picture).hexdigest()
            digest.update(content.encode())
    return digest.hexdigest()


def frozen_fingerprint(model: nn.Module) -> str:
    """Of the weights that a checkpoint does not hold: the tower's as its file says, the decoder's one by one."""
    return _weights_fingerprint(model, learning=False)


def _weights_fingerprint(model: nn.Module, learning: bool) -> str:
    digest = hashlib.sha256(str(getattr(model.config, "vision_sha256", None)).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == learning and not name.startswith("vision_encoder."):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(config: StageConfig, model: nn.Module, processor: VLMProcessor, data: Subset) -> dict:
    """Everything that a checkpoint compares before a run goes on from it, most telling first."""
    weights = ", ".join(f"{weight:.6g}" for weight in weights_of(data))
    return {
        "stage": config.name,
        "tokenizer": processor.fingerprint(),
        "frozen weights": frozen_fingerprint(model),
        "data": data_fingerprint(data),
        "samples": len(data),
        **({"weights in --data_path": weights} if weights else {}),  # so that older checkpoints, too, have the same
        **{f"--{name}": value for name, value in binding_flags(config).items()},
    }


def check_same_on_all_ranks(found: dict, config: StageConfig, model: nn.Module, runtime: Runtime) -> None:
    """Before training, every rank calls: they may be started by hand on machines with files of their own.

    found: this rank's fingerprints. Raises UserError on all ranks, naming the first that differs from rank 0 and how.
    """
    own = {**found, **{f"--{name}": getattr(config, name) for name in SAME_ON_RANKS}, "torch": torch.__version__}
    own |= {name: value for name, value in decoder_arguments(model.config.to_dict()).items() if name not in OPEN}
    if config.shard:  # else rank 0 sends what learns
        own["weights to start from"] = _weights_fingerprint(model, learning=True)
    everybody = runtime.gather((socket.gethostname(), own))
    for rank, (host, theirs) in enumerate(everybody):
        if wrong := [shortened(line) for line in differences(everybody[0][1], theirs)]:
            raise UserError(
                f"rank {rank} on {host} is not like rank 0 on {everybody[0][0]} in {len(wrong)} things: "
                f"{'; '.join(wrong[:SHOWN])}. Give every machine the same command and the same files"
            )


def shortened(line: str) -> str:
    """Digests at a length that can be compared by eye."""
    return " ".join(word[:12] + word[64:] if len(word.rstrip(",")) == 64 else word for word in line.split(" "))
