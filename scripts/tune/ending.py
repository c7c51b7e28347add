"""What happens around training: the held-out questions are asked before and after, and the folder is put in place."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from dataset.exam.answering import answer_all
from dataset.exam.figures import wilson_interval
from dataset.exam.questions import Question, read_questions
from dataset.options import ReadOptions
from model.inference.answerer import Answerer
from model.messages import counted
from scripts.export.folder import MANIFEST, claim, publish, seal

BATCH = 48  # questions that are answered at once
Measure = Callable[[Path], str]  # a folder to a figure, in words


@dataclass(frozen=True)
class Exam:
    """The held-out questions."""

    questions: list[Question]

    @classmethod
    def from_flags(cls, options: argparse.Namespace) -> "Exam":
        """With the flags of add_tune_flags. The pictures are found as those of --data are."""
        return cls(read_questions(options.held_out, ReadOptions.from_flags(options), options.held_out_limit))

    def exact_match(self, folder: Path) -> str:
        """Of our own engine's answers from a folder, as scripts/score.py counts them."""
        answers = answer_all(Answerer.from_weight(folder), self.questions, "right", self.questions, BATCH)
        right = sum(answer == question.truth for answer, question in zip(answers, self.questions, strict=True))
        low, high = wilson_interval(right, len(answers))
        return f"{right / len(answers):.3f} ({low:.2f} to {high:.2f}), {right} of {counted(len(answers), 'questions')}"


def curve_of(output: Path) -> Path:
    """The file of steps beside the folder of --output."""
    return output.with_name(f"{output.name}.jsonl")


def save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """A tuned model in a folder like the one it came from: processor, chat template and config are that one's.

    They have not changed, and what save_pretrained makes of them depends on the version of transformers.
    """
    dtype = json.loads((source / "config.json").read_text(encoding="utf-8"))["dtype"]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith((MANIFEST, "model.safetensors")):
            shutil.copy(path, folder)


def tune(trainer: Trainer, options: argparse.Namespace, measures: dict[str, Measure]) -> None:
    """Train, with every measure taken of the folder before and of the one after, and say what came of it."""
    output = options.output.resolve()
    temporary = claim(output)  # before training, so that none is lost to a folder that cannot be replaced
    try:
        for name, measure in measures.items():
            print(f"before: {name} {measure(options.model)}", flush=True)
        trainer.train()
        save(trainer.accelerator.unwrap_model(trainer.model), options.model, temporary)
        seal(temporary, {"format": "llava", "tuned_from": options.model.name, "steps": options.steps})
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, measure in measures.items():
        print(f"after:  {name} {measure(output)}", flush=True)
    print(f"steps:  {curve_of(options.output)}")
    home = f"--from llava --weight {options.output} --output out/{output.name}.safetensors"
    print(f"home:   {sys.executable} scripts/convert_vlm.py {home}")
