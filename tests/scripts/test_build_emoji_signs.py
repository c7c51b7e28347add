"""scripts/build_emoji_signs.py: files that are the same each time, that read as they should, and say whose they are."""

import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from dataset.exam.questions import read_questions, wrong_pictures
from dataset.readers.opening import read_samples
from helpers.emoji import language_of
from scripts import build_emoji_signs


@pytest.fixture
def build(monkeypatch, tmp_path):
    """build("a", "--train", 3, ...) -> the folder."""

    def run(name: str, *flags: object) -> Path:
        command = ["build_emoji_signs.py", "--output", str(tmp_path / name), "--concepts", "128", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        build_emoji_signs.main()
        return tmp_path / name

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_are_the_same_bytes_and_another_seed_is_another(build):
    sizes = ("--train", 3, "--held_out", 2)
    first = files_of(build("a", *sizes))
    images = ["held_out_000000", "held_out_000001", "train_000000", "train_000001", "train_000002"]
    expected = [
        "LICENSE.txt",
        "held_out.jsonl",
        *(f"images/{name}.jpg" for name in images),
        "pretrain.jsonl",
        "sft.jsonl",
    ]
    assert sorted(first) == sorted(expected)
    assert files_of(build("b", *sizes)) == first
    other = files_of(build("c", *sizes, "--seed", 7))
    assert not {other[f"images/{name}.jpg"] for name in images} & {first[f"images/{name}.jpg"] for name in images}


def test_one_part_is_the_same_without_the_other(build):
    whole = files_of(build("a", "--train", 2, "--held_out", 2))
    for flags in (("--train", 2, "--held_out", 0), ("--train", 0, "--held_out", 2)):
        part = files_of(build("-".join(map(str, flags)), *flags))
        assert part.items() <= whole.items() and len(part) in (4 + 1, 3 + 1)


def test_both_licences_are_named(build):
    text = (build("a", "--train", 0, "--held_out", 0) / "LICENSE.txt").read_text()
    assert "OpenMoji" in text and "CC BY-SA 4.0" in text and "Aileron" in text and "CC0" in text


def test_the_stages_read_what_it_writes(build, capsys):
    folder = build("a", "--train", 4, "--held_out", 0)
    captions, talks = (list(read_samples(folder / f"{name}.jsonl")) for name in ("pretrain", "sft"))
    assert f"sft.jsonl: {len(talks)} lines" in capsys.readouterr().out and len(talks) > 4 * 10
    images = [f"train_{number:06d}" for number in range(4)]
    assert [sample.pictures[0].stem for sample in captions] == images
    # All lines about a picture are neighbours, so that they share its row.
    assert [stem for stem, _ in groupby(sample.pictures[0].stem for sample in talks)] == images
    assert {sample.open_picture(0).size for sample in captions + talks[:1]} == {(896, 896)}
    languages = Counter(language_of(sample.messages[0]["content"]) for sample in talks)
    assert set(languages) == {"en", "zh"} and min(languages.values()) > 10


def test_close_ups_are_of_other_scenes_and_change_nothing_else(build):
    alone, beside = (
        files_of(build(name, "--train", 2, *flags)) for name, flags in (("a", ()), ("b", ("--close_ups", 3)))
    )
    assert alone.items() <= beside.items()
    images = [f"close_up_{number:06d}" for number in range(3)]
    assert sorted(set(beside) - set(alone)) == sorted(
        ["close_ups_pretrain.jsonl", "close_ups_sft.jsonl", *(f"images/{image}.jpg" for image in images)]
    )
    folder = build("c", "--train", 0, "--held_out", 0, "--close_ups", 3)
    for stage in ("pretrain", "sft"):
        samples = list(read_samples(folder / f"close_ups_{stage}.jsonl"))
        assert [stem for stem, _ in groupby(sample.pictures[0].stem for sample in samples)] == images
        assert {sample.open_picture(0).size for sample in samples} == {(224, 224)}


def test_held_out_asks_each_kind_of_each_scene(build):
    folder = build("a", "--train", 0, "--held_out", 4)
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"image", "kind", "language", "conversations"} for line in lines)
    questions = read_questions(folder / "held_out.jsonl")
    assert Counter(question.kind for question in questions) == dict.fromkeys(
        ("word", "number", "which", "signs", "where", "yesno"), 4
    )
    assert Counter(question.language for question in questions) == {"en": 12, "zh": 12}
    assert all(language_of(question.text) == question.language for question in questions)
    assert len({(question.kind, question.language) for question in questions}) == 12
    for question, wrong in zip(questions, wrong_pictures(questions), strict=True):
        assert wrong.sample.pictures != question.sample.pictures


def test_too_few_things_are_refused(build):
    with pytest.raises(ValueError, match="10 concepts are too few"):
        build("a", "--concepts", 10)
