"""What each step of a recipe said, as JSON lines that grow with the run, with the gradient norm of every part."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PARTS = {
    "tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "decoder": "model.language_model.",
}


def gradient_norms(model: PreTrainedModel) -> dict[str, float]:
    """The 2-norm of the gradients of each part of a stock Llava that is trained."""
    squares = dict.fromkeys(PARTS, 0.0)
    for name, parameter in model.named_parameters():
        for part, prefix in PARTS.items():
            if parameter.grad is not None and name.startswith(prefix):
                squares[part] += parameter.grad.float().square().sum().item()
    return {part: square**0.5 for part, square in squares.items() if square}


class Curve(TrainerCallback):
    """Writes a line whenever the trainer logs."""

    def __init__(self, path: Path):
        self.path, self.norms = path, {}

    def on_train_begin(
        self, arguments: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        self.path.write_text("")  # not an earlier run's

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, arguments: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        if (state.global_step + 1) % arguments.logging_steps == 0 or not self.norms:
            self.norms = {f"grad_norm_{part}": norm for part, norm in gradient_norms(given["model"]).items()}

    def on_log(
        self, arguments: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        line = {"step": state.global_step, **given["logs"], **self.norms}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
