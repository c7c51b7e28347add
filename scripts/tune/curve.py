"""What each step of a recipe said, as JSON lines that grow with the run, with the gradient norm of every part."""

import json
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scripts.export.training_proof import gradient_norms


class Curve(TrainerCallback):
    """Writes a line whenever the trainer logs."""

    def __init__(self, path: Path):
        self.path, self.norms = path, {}

    def on_train_begin(
        self, arguments: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        self.path.write_text("")  # not an earlier run's

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
