"""scripts/score.py on files that are not all alike: lines without pictures, lonely ones, one kind of question."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from dataset.exam.answering import score
from dataset.exam.figures import summarize
from dataset.exam.questions import Question, read_questions, wrong_pictures
from dataset.samples import Sample
from helpers.data import make_picture, write_jsonl
from helpers.models import enliven
from model.inference.answerer import Answerer
from scripts import score as scoring
from scripts.export.card import _scores
from scripts.score import table


def question(number: int, pictures: int, show: int | None = None) -> Question:
    first = number if show is None else show
    names = tuple(Path(f"{first}_{k}.png") for k in range(pictures))
    return Question(Sample(f"held_out.jsonl:{number}", [], names), "", "all", "all")


@pytest.fixture
def held_out(tmp_path) -> Path:
    """Two lines of one picture, a lonely one of two, one of none."""
    (tmp_path / "images").mkdir()
    records = []
    for number, count in enumerate((1, 2, 0, 1)):
        names = [f"{number}_{k}.png" for k in range(count)]
        for name in names:
            make_picture(number).save(tmp_path / "images" / name)
        turns = [{"role": "user", "content": "<image>" * count + f"What is number {number}?"},
                 {"role": "assistant", "content": "a cat"}]  # fmt: skip
        records.append({"image": names, "conversations": turns})
    return write_jsonl(tmp_path / "held_out.jsonl", records)


def test_wrong_pictures_are_other_ones_of_the_same_number_spread_over_the_file():
    questions = [question(n, pictures=1 + n % 2, show=n // 6) for n in range(60)]  # neighbours about one picture
    taken = Counter()
    for own, other in zip(questions, wrong_pictures(questions), strict=True):
        assert len(other.sample.pictures) == len(own.sample.pictures) and other.sample.pictures != own.sample.pictures
        taken[other.sample.pictures] += 1
    assert set(taken.values()) == {3}  # no picture stands for many


def test_what_has_no_pictures_or_no_other_is_not_shuffled():
    questions = [question(0, 1), question(1, 0), question(2, 2), question(3, 1), question(4, 2, show=2)]
    assert wrong_pictures(questions) == [questions[3], None, None, questions[0], None]


def test_the_work_grows_with_the_lines_and_not_with_their_square():
    """40,000 questions about one picture among two others: comparing each with its neighbours takes minutes."""
    questions = [question(n, 1, show=min(n, 2)) for n in range(40_000)]
    started = time.process_time()
    assert None not in wrong_pictures(questions)
    assert time.process_time() - started < 10


def test_a_lonely_line_and_one_without_a_picture_are_scored_and_left_out_of_the_shuffled_figure(held_out, vlm, capsys):
    questions = read_questions(held_out)
    report, records = score(Answerer(vlm), questions, batch_size=3)
    assert capsys.readouterr().err == ""  # where there is no terminal, no bar: see tests/model/test_progress.py
    assert {mode: figure["count"] for mode, figure in report["all"].items()} == {"right": 4, "shuffled": 2, "none": 4}
    assert report["not_shuffled"] == {"without_pictures": 1, "without_another": 1}
    assert [record["shuffled"] is None for record in records] == [False, True, True, False]
    assert records[2]["right"] == records[2]["none"]  # there is nothing to take away
    *rows, last = table(json.loads(json.dumps(report))).splitlines()
    assert last == ("left out of the shuffled figure: 2 of 4 questions, 1 without pictures and 1 with no other "
                    "pictures of that number in the file")  # fmt: skip
    assert [row.split()[0] for row in rows[1:]] == ["all"]  # one kind, one language: one row
    assert " (" in _scores(report).splitlines()[2]


def test_a_pth_is_told_how_many_heads_it_has(held_out, make_vlm, tower_folder, tmp_path, monkeypatch):
    model, answers = enliven(make_vlm()), tmp_path / "answers.jsonl"
    torch.save(model.state_dict(), tmp_path / "old.pth")
    flags = ["--weight", tmp_path / "old.pth", "--data", held_out, "--answers", answers, "--device", "cpu", "--dtype",
             "float32", "--vision_model", tower_folder, "--num_attention_heads", 4]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, flags)])
    scoring.main()
    assert [json.loads(line) for line in answers.open()] == score(Answerer(model), read_questions(held_out))[1]


def test_with_nothing_to_shuffle_the_figure_is_missing_and_not_naught(held_out, vlm):
    questions = read_questions(held_out)[1:3]
    report, _ = score(Answerer(vlm), questions)
    assert report["exact_match"]["shuffled"] is None and report["all"]["shuffled"]["count"] == 0
    head, row, _ = table(report).splitlines()
    assert row.split()[5] == "-" and "another picture" not in _scores(report)


def test_shares_and_rows_of_two_kinds():
    questions = [Question(question(n, 1).sample, "yes", ("where", "what")[n > 2], "en") for n in range(4)]
    answers = {"right": ["yes", "no", "no", "yes"], "shuffled": [None] * 3 + ["no"], "none": ["no"] * 4}
    report = summarize(questions, answers)
    assert report["exact_match"] == {"right": round((round(1 / 3, 4) + 1) / 2, 4), "shuffled": 0.0, "none": 0.0}
    assert [row.split("  ")[0] for row in table(report).splitlines()[1:-1]] == [
        "all, kinds alike",
        "where",
        "what",
        "en",
    ]
    assert "| where | 0.333 (0.06 to 0.79) | - | 0.000" in _scores(report)


def test_a_broken_picture_is_left_out_and_told(held_out, capsys):
    (held_out.parent / "images" / "0_0.png").write_text("no picture")
    assert [question.sample.where[-1] for question in read_questions(held_out)] == ["2", "3", "4"]
    said = capsys.readouterr().err
    assert said.startswith("left out 1 of 4 lines: ") and "held_out.jsonl:1: " in said and "cannot be read" in said


def ask(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, flags), "--device", "cpu", "--dtype", "float32"])
    scoring.main()


def test_choices_and_yes_or_no_have_tables_of_their_own(held_out, saved, tmp_path, monkeypatch, capsys):
    choice = {"image": "0_0.png", "question": "What?", "A": "cat", "B": "dog", "answer": "B"}
    path = write_jsonl(tmp_path / "choices.jsonl", [choice, {**choice, "image": "3_0.png", "answer": "A"}])
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    ask(monkeypatch, "--weight", saved, "--data", path, "--base", saved, "--json", report, "--sheet", sheet)
    said = capsys.readouterr().out
    assert said.split()[:2] == ["right", "picture"] and "leakage" in said and sheet.is_file()
    rules = json.loads(report.read_text())["rules"]
    assert rules["texts"]["leakage"] == 0 and rules["texts"]["right"]["count"] == 2  # of its own base
    path = write_jsonl(tmp_path / "pope.jsonl", [{"image": "0_0.png", "question": "Is it?", "answer": "Yes"}])
    ask(monkeypatch, "--weight", saved, "--data", path)
    assert capsys.readouterr().out.split()[:3] == ["accuracy", "precision", "recall"]
    with pytest.raises(SystemExit, match="--base is for the leakage of questions with choices"):
        ask(monkeypatch, "--weight", saved, "--data", path, "--base", saved)
    mixed = f"{tmp_path / 'choices.jsonl'},{held_out}"
    with pytest.raises(SystemExit, match="2 of 6 questions have choices: score them as a file of their own"):
        ask(monkeypatch, "--weight", saved, "--data", mixed)
