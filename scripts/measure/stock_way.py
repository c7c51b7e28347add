"""transformers' own way with a stock Llava folder: its Trainer for stage 2, its generate() for answers."""

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from dataset.readers.opening import read_samples
from dataset.samples import Sample
from model.config import IGNORE_INDEX
from model.messages import UserError
from model.processing import content_parts

WARM_UP = 1  # steps that do not count


def check_accelerate() -> None:
    """Raises UserError where transformers' Trainer lacks the package that it needs."""
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs the package accelerate: python -m pip install accelerate")


def messages_of(messages: Sequence[dict]) -> list[dict]:
    """Turns as transformers' chat templates take them: parts, pictures among them."""
    return [
        {
            "role": message["role"],
            "content": [{"type": "image"} if kind == "image" else {"type": "text", "text": text}
                        for kind, text in content_parts(message["content"])],
        }
        for message in messages
    ]  # fmt: skip


class Collator:
    """Samples to a batch: the processor for each, padded to the longest; the last answer is learnt."""

    def __init__(self, processor: ProcessorMixin, image_tokens: int):
        self.processor, self.image_tokens = processor, image_tokens

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        rows = [self.row(sample) for sample in samples]
        filling = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {name: pad_sequence([row[name] for row in rows], True, value) for name, value in filling.items()}
        return {**batch, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    def row(self, sample: Sample) -> dict[str, torch.Tensor]:
        messages = messages_of(sample.messages)
        text = self.processor.apply_chat_template(messages)
        inputs = self.processor(text=text, images=sample.open_pictures(), return_tensors="pt")
        asked = self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        before = len(self.processor.tokenizer(asked)["input_ids"]) + len(sample.pictures) * (self.image_tokens - 1)
        ids = inputs["input_ids"][0]
        labels = torch.where(torch.arange(len(ids)) < before, IGNORE_INDEX, ids)
        mask = inputs["attention_mask"][0]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": inputs["pixel_values"]}


class StepClock(TrainerCallback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class StockRun:
    folder: Path  # as convert_vlm --to llava writes it
    data: Path
    conversations: int  # through the model at once
    accumulation_steps: int
    steps: int  # that count
    bfloat16: bool
    threads: int


def train_with_trainer(run: StockRun) -> float:
    """Conversations a second of transformers' Trainer: projector and decoder learn, as in stage 2.

    To be called in a process of its own.
    """
    torch.set_num_threads(run.threads)
    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(run.folder)
    model = AutoModelForImageTextToText.from_pretrained(run.folder, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    samples, clock = list(read_samples(run.data)), StepClock()
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, max_steps=WARM_UP + run.steps, per_device_train_batch_size=run.conversations,
            gradient_accumulation_steps=run.accumulation_steps, learning_rate=1e-6, bf16=run.bfloat16, use_cpu=True,
            dataloader_num_workers=1, remove_unused_columns=False, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collator = Collator(processor, model.config.image_seq_length)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=samples, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    counted = run.steps * run.conversations * run.accumulation_steps
    return counted / (clock.ends[-1] - clock.ends[WARM_UP - 1])


class TokenClock(BaseStreamer):
    """Notes when each new token was there; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


class StockAnswers:
    """generate() of a stock folder, greedy; nothing but the length ends an answer."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def answer(self, messages: Sequence[dict], picture: Image.Image, tokens: int) -> tuple[float, float, list[int]]:
        """Seconds to the first of so many tokens, tokens a second after it, and the tokens."""
        clock, started = TokenClock(), time.perf_counter()
        text = self.processor.apply_chat_template(messages_of(messages), add_generation_prompt=True)
        inputs = self.processor(text=text, images=picture, return_tensors="pt").to(dtype=self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=clock)
        first, *_, last = clock.times[1:]
        return first - started, (tokens - 1) / (last - first), ids[0, -tokens:].tolist()
