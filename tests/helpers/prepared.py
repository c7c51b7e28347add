"""What scripts/prepare_data.py is given and makes, for tests: samples of all kinds, and folders of shards."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import parquet

from helpers.data import make_picture, turns

WORDS = ("a cat", "a dog", "a bird")


def write_source(folder: Path) -> Path:
    """Three questions each about twenty pictures, one sample of two pictures, one of none, fields of all kinds."""
    (folder / "images").mkdir(parents=True)
    for number in range(20):
        kind = ("png", "jpg", "webp")[number % 3]
        make_picture(number).save(folder / "images" / f"{number}.{kind}")
    records = [
        {"image": path.name, "kind": word, "number": place, "conversations": turns(1, f"{word} {path.name}")}
        for path in sorted((folder / "images").iterdir())
        for place, word in enumerate(WORDS)
    ]
    records += [{"image": "0.png,1.jpg", "conversations": turns(2), "rating": 0.5, "tags": ["a"], "language": None},
                {"conversations": turns(0, "一只猫"), "good": True, "text_id": "\ud800", "images": "none"}]  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(prepare: Callable, *flags: object, **places: Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare(*flags, **places)
    sentence = str(stopped.value)
    assert sentence.startswith("prepare_data: ") and "\n" not in sentence
    return sentence


def shards_of(folder: Path, name: str = "train") -> list[Path]:
    return sorted(folder.glob(f"{name}-*.parquet"))


def rows_of(folder: Path, name: str = "train") -> list[dict]:
    return [row for path in shards_of(folder, name) for row in parquet.read_table(path).to_pylist()]


def words_of(folder: Path, name: str = "train") -> list[str]:
    return [json.loads(row["conversations"])[-1]["content"] for row in rows_of(folder, name)]


def pictures_of(folder: Path, name: str) -> set[str]:
    return {hashlib.sha256(picture).hexdigest() for row in rows_of(folder, name) for picture in row["image_bytes"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def index_of(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())
