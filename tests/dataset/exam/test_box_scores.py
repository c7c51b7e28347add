"""Boxes scored: by hand, with names, too many and too few; and score.py's way to them."""

import json
import sys

import pytest
from PIL import Image

from dataset.exam.answering import BOXES, BRIEF, answer_all
from dataset.exam.box_scores import figures, holds_boxes, is_found, judged, overlaps, score_boxes, table
from dataset.exam.mistakes import wrong_answers
from dataset.exam.questions import Question, read_questions
from helpers.data import write_jsonl
from scripts import score as scoring

LEFT, RIGHT, WHOLE = "<box> 0 0 50 100", "<box> 50 0 100 100", "<box> 0 0 100 100"


@pytest.fixture
def questions(folder) -> list[Question]:
    asked = [("a.png", "Where is the cat?", LEFT, "box", "en"), ("b.png", "在哪里？", RIGHT, "box", "zh"),
             ("c.png", "Box all.", f"cat {LEFT}, bus {RIGHT}", "boxes", "en")]  # fmt: skip
    records = [{"image": i, "question": q, "answer": a, "kind": k, "language": n} for i, q, a, k, n in asked]
    return read_questions(write_jsonl(folder / "boxes.jsonl", records))


@pytest.mark.parametrize(
    ("truth", "answer", "found"),
    [(LEFT, LEFT, [1]), (LEFT, WHOLE, [0.5]), (LEFT, RIGHT, [0]), (LEFT, "left", [0]), (LEFT, "", [0]),
     (LEFT, f"the cat {LEFT}", [1]),  # one box alone needs no name
     (f"cat {LEFT}", LEFT, [1]),
     (LEFT, f"{RIGHT}, {LEFT}", [1, 0]),  # one too many
     (f"cat {LEFT}, bus {RIGHT}", f"bus {RIGHT}, Cat {LEFT}", [1, 1]),  # in any order
     (f"cat {LEFT}, bus {RIGHT}", f"bus {LEFT}, cat {RIGHT}", [0, 0]),  # right places, wrong names
     (f"cat {LEFT}, bus {RIGHT}", f"cat {WHOLE}", [0.5, 0]),
     (f"cat {LEFT}, bus {RIGHT}", f"cat {LEFT}, dog {RIGHT}, bus {WHOLE}", [1, 0.5, 0]),
     (f"ant {LEFT}, ant {RIGHT}", f"ant {RIGHT}, ant {LEFT}", [1, 1]),  # two of one name
     (f"ant {LEFT}, ant {RIGHT}", f"ant {WHOLE}, ant {LEFT}", [1, 0.5]),
     (f"{LEFT}, {RIGHT}", f"x {RIGHT}, y {LEFT}", [1, 1])],
)  # fmt: skip
def test_each_true_box_has_one_of_its_name(truth, answer, found):
    assert overlaps(truth, answer) == found


def test_figures_by_hand():
    found = figures([[1.0], [0.5, 0.0], [0.75]])
    assert (found["mean_iou"], found["found"], found["found_well"]) == (0.5625, 0.75, 0.5)
    assert (found["boxes"], found["count"]) == (4, 3) and found["interval"][0] < 0.75 < found["interval"][1]
    assert figures([])["mean_iou"] is None


def test_modes_kinds_and_languages(questions, monkeypatch):
    answers = {"right": [LEFT, "no idea", f"bus {RIGHT}, cat {WHOLE}"], "shuffled": [WHOLE, None, ""], "none": [""] * 3}
    monkeypatch.setattr("dataset.exam.box_scores.answer_all", lambda answerer, asked, mode, wrong, size: answers[mode])
    report, records = score_boxes(None, questions)
    right = report["all"]["right"]
    assert (right["mean_iou"], right["found"], right["found_well"]) == (0.625, 0.75, 0.5)
    assert (right["boxes"], right["count"], right["without_box"]) == (4, 3, 1)
    assert report["all"]["shuffled"]["mean_iou"] == round(0.5 / 3, 4) and report["all"]["shuffled"]["count"] == 2
    assert report["all"]["none"] | {"interval": 0} == {
        "mean_iou": 0.0, "found": 0.0, "found_well": 0.0, "interval": 0, "boxes": 4, "count": 3, "without_box": 3,
    }  # fmt: skip
    assert report["by_kind"]["box"]["right"]["mean_iou"] == 0.5
    assert report["by_language"]["en"]["right"]["mean_iou"] == round(2.5 / 3, 4)
    assert [record["iou"]["right"] for record in records] == [1, 0, 0.75]
    assert records[1]["iou"]["shuffled"] is None and records[0]["shuffled"] == WHOLE
    assert [is_found(record) for record in records] == [True, False, True]
    assert not is_found(records[1], "shuffled")
    assert [said for _, said, _ in wrong_answers(questions, records)] == [
        "no idea"
    ]  # and not the one letters differ in
    rows = table(json.loads(json.dumps(report))).splitlines()
    assert rows[0].split() == ["mean", "IoU", "IoU", ">=", "0.5", ">=", "0.75", "boxes", "no", "box"]
    assert [row[:18].strip() for row in rows[1:]] == [
        "right picture", "another picture", "no picture", "box", "boxes", "en", "zh",
    ]  # fmt: skip
    assert rows[1].split()[2:] == ["0.625", "0.750", "0.30", "to", "0.95", "0.500", "4", "1"]


def test_only_where_every_answer_has_a_box(questions):
    assert holds_boxes(questions) and not holds_boxes([])
    named = [*questions, Question(questions[0].sample, "top left", "where", "en")]
    assert not holds_boxes(named)


def test_who_counts_exact_matches_is_told_that_what_fits_is_true(questions):
    answers = [WHOLE, "no", f"cat {LEFT}"]
    assert judged(questions, answers) == [LEFT, "no", questions[2].truth]
    assert judged(questions, [None] * 3) == [None] * 3
    mixed = [*questions, Question(questions[0].sample, "left", "where", "en")]
    assert judged(mixed, [*answers, "left"]) == [*answers, "left"]


def test_lists_of_boxes_have_room_and_other_answers_what_they_had(questions):
    class Recorder:
        def prompt(self, messages, pictures=()):
            return messages

        def batch(self, prompts, options):
            given.append(options)
            return []

    given: list = []
    for asked in (questions, [Question(questions[0].sample, "a cat", "what", "en")]):
        with pytest.raises(ValueError, match="zip"):
            answer_all(Recorder(), asked, "none", [], 8, silent=True)
    assert given == [BOXES, BRIEF] and BRIEF.max_new_tokens == 64


def test_score_finds_boxes_in_a_file_and_draws_them(questions, saved, tmp_path, monkeypatch, capsys):
    files = {flag: tmp_path / f"found.{ending}" for flag, ending in
             (("--json", "json"), ("--answers", "jsonl"), ("--html", "html"), ("--sheet", "png"))}  # fmt: skip
    data = questions[0].sample.where.rsplit(":", 1)[0]
    flags = ["--weight", saved, "--data", data, "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(
        sys, "argv", ["score.py", *map(str, flags), *(str(part) for pair in files.items() for part in pair)]
    )
    scoring.main()
    assert "mean IoU" in capsys.readouterr().out
    assert json.loads(files["--json"].read_text())["all"]["right"]["boxes"] >= 4
    assert all("iou" in json.loads(line) for line in files["--answers"].open(encoding="utf-8"))
    page = files["--html"].read_text(encoding="utf-8")
    assert "mean IoU" in page and "Which name was said" not in page
    assert Image.open(files["--sheet"]).width > 900
