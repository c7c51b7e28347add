"""scripts/build_emoji_world.py with what the quickstart adds: many things, relations, pairs, pictures behind, the exam.

tests/dataset/test_emoji_world.py has the rest of the script.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from dataset.exam import emoji_exam
from dataset.exam.caption_facts import facts
from dataset.exam.questions import read_questions
from dataset.readers.opening import read_samples
from helpers.emoji import NUMBERS
from scripts import build_emoji_world


@pytest.fixture
def build(monkeypatch, tmp_path):
    """build("--sft", 3, ...) -> the folder."""
    monkeypatch.setattr(emoji_exam, "photographs", dict)  # none

    def run(*flags: object) -> Path:
        sizes = {"--pretrain": 0, "--sft": 0, "--held_out": 0, "--concepts": 256, "--questions": 4}
        given = [str(part) for pair in sizes.items() for part in pair] + [str(flag) for flag in flags]
        monkeypatch.setattr(sys, "argv", ["build_emoji_world.py", "--output", str(tmp_path), *given])
        build_emoji_world.main()
        return tmp_path

    return run


def opened(path: Path) -> list:
    """Samples of a file, each with all its pictures opened."""
    samples = list(read_samples(path))
    for sample in samples:
        assert len(sample.open_pictures()) == len(sample.pictures) > 0
    return samples


def test_relations_pairs_and_pictures_behind(build):
    flags = ["--sft", 5, "--relations", "--behind", 1, "--pairs", 3, "--questions", 12, "--max_things", 9]
    samples = opened(build(*flags) / "sft.jsonl")
    stems = Counter(tuple(path.stem for path in sample.pictures) for sample in samples)
    pairs = [stem for stem in stems if len(stem) == 2]
    assert pairs == [(f"pairs_{n:06d}_1", f"pairs_{n:06d}_2") for n in range(3)]
    assert [stem for stem in stems if len(stem) == 1] == [(f"sft_{n:06d}",) for n in range(5)]
    assert all(1 <= stems[pair] <= 12 for pair in pairs)
    openings = [sample.messages[0]["content"] for sample in samples]
    behind = [sample.pictures for sample, text in zip(samples, openings, strict=True) if text.endswith("\n<image>")]
    assert sorted(path.stem for (path,) in behind) == [f"sft_{n:06d}" for n in range(5)]
    said = " ".join(openings)
    assert any(relation in said for relation in (" left of the ", "larger", "bigger", "更大", "比较大", "的左边"))


def test_pairs_can_be_had_alone(build):
    samples = opened(build("--pairs", 2) / "sft.jsonl")
    assert {len(sample.pictures) for sample in samples} == {2}


def test_many_things_are_for_the_stages_and_not_for_the_comparison(build):
    folder = build("--pretrain", 12, "--max_things", 9, "--held_out", 12)
    numbers = []
    for sample in opened(folder / "pretrain.jsonl"):
        [number] = facts(sample.messages[1]["content"])["count"]
        numbers.append(next(listed.index(number) for listed in NUMBERS.values() if number in listed) + 1)
    assert max(numbers) > 4 and len(numbers) == 12
    counted = [q.truth for q in read_questions(folder / "held_out.jsonl") if q.kind == "count"]
    assert set(counted) <= {number for listed in NUMBERS.values() for number in listed[:4]} and len(counted) == 12


def test_the_exam_comes_beside_the_other_files(build, capsys):
    folder = build("--exam", 1)
    questions = read_questions(folder / "exam.jsonl")
    assert f"exam.jsonl: {len(questions)} lines" in capsys.readouterr().out and len(questions) > 40
    assert all(json.loads(line)["category"] for line in (folder / "exam.jsonl").open(encoding="utf-8"))
    assert not (folder / "sft.jsonl").exists()
