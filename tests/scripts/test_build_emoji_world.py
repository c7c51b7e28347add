"""scripts/build_emoji_world.py with what the quickstart adds: many things, relations, pairs, pictures behind, the exam.

tests/dataset/test_emoji_world.py has the rest of the script.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from dataset import emoji_world as world
from dataset.boxes import boxes_in
from dataset.exam import emoji_exam
from dataset.exam.box_scores import holds_boxes
from dataset.exam.caption_facts import facts
from dataset.exam.questions import read_questions
from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset
from helpers.emoji import NUMBERS
from model.processing import VLMProcessor
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


def test_boxes_come_first_of_each_picture_and_change_nothing_else(build, processor):
    flags = ["--pretrain", 2, "--sft", 6, "--held_out", 3, "--pairs", 1, "--behind", 1, "--concepts", 128]
    folder = build(*flags)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert Path("held_out_boxes.jsonl") not in before
    build(*flags, "--boxes")
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = {path for path, content in after.items() if before.get(path) != content}
    assert changed == {Path("sft.jsonl"), Path("held_out_boxes.jsonl")} and set(before) < set(after)
    lines = [json.loads(line) for line in after[Path("sft.jsonl")].decode().splitlines()]
    boxed = [bool(boxes_in(line["conversations"][1]["content"])) for line in lines]
    assert [line for line, box in zip(lines, boxed, strict=True) if not box] == [
        json.loads(line) for line in before[Path("sft.jsonl")].decode().splitlines()
    ]
    starts = [n for n, line in enumerate(lines) if n == 0 or line["image"] != lines[n - 1]["image"]]
    assert len(starts) == 7 and all(boxed[start] for start in starts[:6])
    rows = ConversationDataset(opened(folder / "sft.jsonl"), VLMProcessor(processor.tokenizer), 1024)
    assert len(rows) == 2 * 6 + 1  # a row a picture, one with that behind the question, and the pair's


def test_held_out_boxes_are_questions_of_two_kinds_about_the_held_out_pictures(build):
    folder = build("--held_out", 6, "--concepts", 128, "--boxes")
    questions = read_questions(folder / "held_out_boxes.jsonl")
    assert holds_boxes(questions) and not holds_boxes(read_questions(folder / "held_out.jsonl"))
    assert Counter((question.kind, question.language) for question in questions) == dict.fromkeys(
        [("box", "en"), ("box", "zh"), ("boxes", "en"), ("boxes", "zh")], 3
    )
    for number, question in enumerate(questions):
        scene = world.sample_scene(424, "held_out", number // 2, 128)
        assert question.sample.pictures[0].name == f"held_out_{number // 2:06d}.jpg"
        true = set(world.boxes(scene))
        assert set(boxes_in(question.truth)) <= true and len(boxes_in(question.truth)) == (
            len(true) if question.kind == "boxes" else 1
        )
    assert not (folder / "sft.jsonl").exists()
