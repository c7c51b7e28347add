"""Data for tests: conversations, pictures, and the files that hold them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from dataset.readers.opening import read_samples
from dataset.samples import Sample
from dataset.vlm_dataset import ConversationDataset
from helpers.models import IMAGE_SIZE
from model.processing import VLMProcessor

TURNS = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a cat"}]
SOUND = {"image": "a.png", "conversations": TURNS}


def turns(pictures: int, answer: str = "a cat") -> list[dict]:
    question = "<image>" * pictures + "What is it?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_picture(seed: int, size: int = IMAGE_SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, conversations, image_bytes, **options) -> Path:
    table = {"image_names": ["x"] * len(conversations), "image_bytes": image_bytes, "conversations": conversations}
    parquet.write_table(pyarrow.table(table), path, **options)
    return path


def open_lines(folder: Path, *lines: str | dict) -> list[Sample]:
    path = folder / "train.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return list(read_samples(path))


def construct(samples, processor: VLMProcessor, max_seq_len: int = 64) -> ConversationDataset:
    return ConversationDataset(samples, processor, max_seq_len)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


BLACK = encoded(Image.new("RGB", (8, 8)), "JPEG")
