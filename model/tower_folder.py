"""A folder with the weights of a vision tower: what it must hold, what kind it is, and what identifies it."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from model.config import BICUBIC
from model.files import SHIPPED_TOWER, file_sha256, find_folder
from model.messages import UserError, did_you_mean
from model.vision_encoder import DEFAULT_KIND, KINDS, TowerKind, kind_of, unwrap

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # text and vision together, and the half we take
NAFLEX = ("siglip2", "siglip2_vision_model")  # pictures of any shape, already cut into patches
LAYERS = r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\."


def read_tower(folder: str | Path) -> tuple[PreTrainedModel, str]:
    """The tower of a folder, frozen, in fp32, and the sha256 of its weights file.

    folder: as transformers saves it; text and vision together (openai/clip-vit-base-patch16) or vision alone.

    Raises:
        UserError: no such folder, a kind that is not known, or its weights are not those of a complete tower.
    """
    given, folder = folder, find_folder(folder)
    if reason := lacks_tower(folder):
        if meant := did_you_mean(given) or did_you_mean(folder):
            raise UserError(f"{folder} holds no vision tower: {reason}{meant}")
        raise UserError(
            f"{folder} holds no vision tower: {reason}. Fetch openai's with `python "
            f"scripts/download.py clip --to {folder}`, or name the small shipped one: "
            f"--vision_model {SHIPPED_TOWER}"
        )
    weights = next(folder / name for name in WEIGHT_NAMES if (folder / name).is_file())
    kind, said = kind_of(tower_sizes(folder)), logging.get_verbosity()
    logging.disable_progress_bar()  # it would flash for a file of this size
    logging.set_verbosity_error()  # it would list the text half and the pooling head, which are left out on purpose
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        for name, value in kind.fixed.items():
            setattr(config, name, value)
        tower, report = kind.model_class.from_pretrained(
            folder, config=config, output_loading_info=True, dtype=torch.float32, local_files_only=True,
            ignore_mismatched_sizes=True, key_mapping=_longer_names(kind),
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({str(error)[:200]}): copy or download it again") from error
    finally:
        logging.set_verbosity(said)
    wrong = [*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])]
    if wrong:
        raise UserError(f"{weights} lacks {len(wrong)} of the vision tower's tensors, the first is {wrong[0]}")
    return unwrap(tower).requires_grad_(False).eval(), file_sha256(weights)


def _longer_names(kind: TowerKind) -> dict[str, str] | None:
    """From the names in a file of the tower alone to those of a class that wraps it once more."""
    if "intermediate_size" not in kind.sizes:  # neither DINOv2 nor EfficientNet ever was
        return None
    smallest = kind.model_class(kind.config_class(num_hidden_layers=0, **kind.fixed))
    return {LAYERS: r"vision_model.\1."} if unwrap(smallest) is not smallest else None


def lacks_tower(folder: str | Path) -> str | None:
    """Why a folder cannot hold a tower, None where it may."""
    folder = find_folder(folder)
    if not folder.is_dir():
        return "the folder does not exist"
    complete = any((folder / name).is_file() for name in WEIGHT_NAMES) and (folder / "config.json").is_file()
    return None if complete else "no weights in it"


def tower_sizes(folder: str | Path) -> dict:
    """A tower's VLMConfig.vision_config: its kind, sizes and what its pictures look like, without its weights.

    Raises:
        UserError: there is no config.json, or one of a tower that is not known or does not look at squares.
    """
    folder = find_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"--vision_model {folder} has no config.json: leave it out for CLIP-ViT-B/16's sizes")
    name = _kind_named(folder)
    kind = KINDS[name]
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{folder} is damaged ({str(error)[:200]}): copy or download it again") from error
    sizes = {field: getattr(config, field) for field in (*kind.sizes, "hidden_size", "patch_size")}
    for field in ("image_size", "patch_size"):
        sizes[field] = _side(folder, field, sizes[field])
    if getattr(config, "num_channels", 3) != 3:
        raise UserError(f"{folder} holds a tower for {config.num_channels} channels: pictures have 3")
    return {"model_type": name, **sizes, **looks_of(folder, kind, sizes)}


def _kind_named(folder: Path) -> str:
    facts = _read_json(folder / "config.json")
    name = facts.get("model_type", DEFAULT_KIND)
    name = WHOLE.get(name, name)
    if name in NAFLEX:
        raise UserError(
            f"{folder} holds a SigLIP2 for pictures of any shape ({name}, NaFlex): take one of a fixed size, such as "
            "google/siglip2-base-patch16-224"
        )
    if name not in KINDS:
        raise UserError(f"{folder} holds a {name}, which is no tower that is known: {', '.join((*WHOLE, *KINDS))}")
    return name


def looks_of(folder: Path, kind: TowerKind, sizes: dict) -> dict:
    """What pictures are made to look like, by preprocessor_config.json or the kind: image_mean and image_std.

    And where they are not what goes without saying, picture_size (image_size) and resample (bicubic).
    """
    facts = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            facts = _read_json(folder / name)
            facts = facts.get("image_processor", facts)
            break
    looks = {}
    for field, default in (("image_mean", kind.mean), ("image_std", kind.std)):
        values = facts.get(field) or default
        if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
            raise UserError(f"{folder / name}: {field} {values} must be three numbers")
        looks[field] = [float(value) for value in values]
    if min(looks["image_std"]) <= 0:
        raise UserError(f"{folder / name}: image_std {looks['image_std']} must be above 0")
    resample = facts.get("resample", BICUBIC)
    if resample not in list(Image.Resampling):
        raise UserError(f"{folder / name}: resample {resample} is none of Pillow's filters, 0 to 5")
    looks |= {"resample": resample} if resample != BICUBIC else {}
    size = facts.get("crop_size") if facts.get("do_center_crop", True) else None
    size = size or facts.get("size")
    if size and kind.any_size:
        size = _side(folder, "size", [*size.values()] if isinstance(size, dict) else size)
        if size % sizes["patch_size"]:
            raise UserError(f"{folder / name}: size {size} is no multiple of the patch size {sizes['patch_size']}")
        looks |= {"picture_size": size} if size != sizes["image_size"] else {}
    return looks


def _side(folder: Path, field: str, size: int | list[int] | tuple[int, ...]) -> int:
    """Pixels a side of a square. Raises UserError where it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{folder}: {field} {' x '.join(map(str, size))} is not square; only square towers are known")
    return int(sides.pop())


def _read_json(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download {path.parent} again") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged (it holds no settings): copy or download {path.parent} again")
    return facts
