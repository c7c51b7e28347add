"""Samples with captions, and what a model would learn from them: to compare one way of storing them with another."""

from pathlib import Path

import torch

from dataset.formats import DESCRIBE
from dataset.options import ReadOptions
from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset
from helpers.data import encoded, make_picture
from helpers.formats import TAG, Written
from model.processing import VLMProcessor

WORDS = [
    "a cat",
    "two dogs",
    "一只猫",
    'the sky, blue\nand "wide"',
    "@@@",
    "<|im_end|>",
    "\t x",
    "café",
    "{}[],:",
    "\\",
]


def captioned(count: int) -> list[Written]:
    """One picture, the question that captions answer, and a caption."""
    samples = []
    for number in range(count):
        caption = f"{WORDS[number % len(WORDS)]} {number}".strip()
        question = DESCRIBE["zh" if "一" in caption else "en"]
        talk = [{"role": "user", "content": f"{TAG}\n{question}"}, {"role": "assistant", "content": caption}]
        samples.append(Written(talk, [encoded(make_picture(number, 12), "PNG")]))
    return samples


def learnt(path: Path | str, options: ReadOptions, processor: VLMProcessor, length: int = 400) -> list[tuple]:
    """(ids, labels, pixels) of each sample."""
    samples = read_samples(path, options)
    rows = []
    for number in range(len(samples)):
        data = ConversationDataset([samples[number]], processor, length)
        rendered, pixels, _ = data[0]
        rows.append((rendered.input_ids.tolist(), rendered.labels.tolist(), pixels))
    return rows


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    assert len(found) == len(wanted)
    for (ids, labels, pixels), (wanted_ids, wanted_labels, wanted_pixels) in zip(found, wanted, strict=True):
        assert ids == wanted_ids and labels == wanted_labels
        assert len(pixels) == len(wanted_pixels) and all(map(torch.equal, pixels, wanted_pixels))
