"""A folder with the weights of a CLIP tower: what it must hold, and what identifies it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers.utils import logging

from model.files import file_sha256, find_folder
from model.messages import UserError, did_you_mean
from model.vision_encoder import unwrap

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
SHIPPED_TOWER = "model/vision_model/emoji-clip"  # from ROOT


def read_tower(folder: str | Path) -> tuple[PreTrainedModel, str]:
    """The vision half of a CLIP folder, frozen, in fp32, and the sha256 of its weights file.

    folder: as transformers saves it; text and vision together (openai/clip-vit-base-patch16) or vision alone.

    Raises:
        UserError: no such folder, or its weights are not those of a complete CLIP vision tower.
    """
    given, folder = folder, find_folder(folder)
    if reason := lacks_tower(folder):
        if meant := did_you_mean(given) or did_you_mean(folder):
            raise UserError(f"{folder} holds no CLIP vision tower: {reason}{meant}")
        raise UserError(
            f"{folder} holds no CLIP vision tower: {reason}. Fetch openai's with `python "
            f"scripts/download.py clip --to {folder}`, or name the small shipped one: "
            f"--vision_model {SHIPPED_TOWER}"
        )
    weights = next(folder / name for name in WEIGHT_NAMES if (folder / name).is_file())
    logging.disable_progress_bar()  # it would flash for a file of this size
    wrapped = hasattr(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=0)), "vision_model")
    names = {r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.": r"vision_model.\1."} if wrapped else None
    try:
        tower, report = CLIPVisionModel.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True,
            key_mapping=names,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({str(error)[:200]}): copy or download it again") from error
    wrong = [*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])]
    if wrong:
        raise UserError(f"{weights} lacks {len(wrong)} of the vision tower's tensors, the first is {wrong[0]}")
    return unwrap(tower).requires_grad_(False).eval(), file_sha256(weights)


def lacks_tower(folder: str | Path) -> str | None:
    """Why a folder cannot hold a CLIP tower, None where it may."""
    folder = find_folder(folder)
    if not folder.is_dir():
        return "the folder does not exist"
    complete = any((folder / name).is_file() for name in WEIGHT_NAMES) and (folder / "config.json").is_file()
    return None if complete else "no weights in it"


def tower_sizes(folder: str | Path) -> dict:
    """What a tower's config.json says, without its weights. Raises UserError where the folder has none."""
    folder = find_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"--vision_model {folder} has no config.json: leave it out for CLIP-ViT-B/16's sizes")
    return CLIPVisionConfig.from_pretrained(folder, local_files_only=True).to_dict()
