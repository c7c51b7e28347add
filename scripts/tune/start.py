"""Where a recipe starts from: its flags, and the folder that it tunes, loaded by transformers alone."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin

from dataset.options import add_read_flags
from model.command_line import CommandLine
from model.device import choose_device, choose_dtype
from model.inference.llava_projector import SMALL
from model.messages import UserError


def add_tune_flags(parser: CommandLine, steps: int, batch_size: int, learning_rate: float) -> None:
    """The flags that all recipes have, with the defaults of one of them."""
    parser.add_argument("--model", type=Path, required=True, help="folder that convert_vlm.py --to llava wrote")
    parser.add_argument("--data", required=True, help="what to train on, a file or a folder of any format")
    parser.add_argument("--held_out", type=Path, required=True, help="questions to score with, none of --data")
    parser.add_argument("--held_out_limit", type=int, help="only the first so many of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, or an older one to replace")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=batch_size, help="rows a step")
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--train_tower", action="store_true", help="train the vision tower too; the stages never do")
    parser.add_argument("--seed", type=int, default=0)
    add_read_flags(parser)


@dataclass(frozen=True)
class Start:
    """A model with all that trains it, but the data."""

    model: PreTrainedModel
    processor: ProcessorMixin
    settings: dict  # the keywords that the configs of all of TRL's trainers share

    @classmethod
    def from_flags(cls, options: argparse.Namespace) -> "Start":
        """With the flags of add_tune_flags.

        Raises:
            UserError: the folder is none that can be trained.
        """
        if min(options.steps, options.batch_size) < 1 or options.learning_rate <= 0:
            raise UserError("--steps, --batch_size and --learning_rate must be above 0")
        model, processor = _load(options.model)
        # The tower is as frozen as in the stages: a few hundred rows teach it nothing, and a file of the project's
        # names the tower that it was trained with instead of holding it.
        model.model.vision_tower.requires_grad_(options.train_tower)
        device = choose_device("auto")
        settings = {
            "output_dir": str(options.output), "max_steps": options.steps, "learning_rate": options.learning_rate,
            "per_device_train_batch_size": options.batch_size, "seed": options.seed,
            "bf16": choose_dtype("auto", device) == torch.bfloat16, "use_cpu": device.type == "cpu",
            "activation_checkpointing": False,  # these models are small: time is short, memory is not
            "save_strategy": "no", "report_to": "none", "logging_steps": max(1, options.steps // 50),
            "remove_unused_columns": False,  # the rows have none, they are made when they are asked for
        }  # fmt: skip
        return cls(model, processor, settings)


def _load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {folder} is no model folder: its config.json cannot be read ({error})") from error
    if kind != "llava":
        raise UserError(f"--model {folder} holds a model of type {kind!r}: a recipe tunes what --to llava writes")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if model.model.multi_modal_projector.linear_2.weight.abs().max() > 1 / SMALL:
        raise UserError(
            f"--model {folder} has a projector that is scaled for engines that only answer, and its gradients are out "
            "of all proportion: convert it again, without --engine"
        )
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
