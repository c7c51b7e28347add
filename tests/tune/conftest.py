"""A tiny Llava folder with questions to tune it on, where TRL is installed."""

from pathlib import Path

import pytest

from helpers.data import make_picture, write_jsonl
from helpers.exports import export, make_seeing

ASKED = {
    "What is it?": ("a cat", "a dog"),
    "What is there?": ("cat, dog, cow", "cow, cat"),
    "有什么？": ("猫、狗", "牛"),
}


@pytest.fixture(scope="session")
def seeing():
    """16 tokens a picture."""
    return make_seeing(projector="mlp")


@pytest.fixture(scope="session")
def folder(seeing, tmp_path_factory) -> Path:
    return export(seeing, "llava", tmp_path_factory.mktemp("llava") / "folder")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """24 questions about four pictures; each question has two answers, of different pictures."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for number in range(4):
        make_picture(number).save(folder / f"images/{number}.png")
    records = [
        {"image": f"{number}.png", "conversations": [
            {"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answers[number % 2]},
        ]}
        for _ in range(2) for number in range(4) for question, answers in ASKED.items()
    ]  # fmt: skip
    return write_jsonl(folder / "questions.jsonl", records)
