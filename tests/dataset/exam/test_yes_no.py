"""Yes and no as POPE counts them, beside a count by hand."""

from dataclasses import replace

import pytest

from dataset.exam.questions import read_questions
from dataset.exam.yes_no import figures, is_yes_no, score_yes_no, table, yes_or_no
from helpers.data import write_jsonl
from helpers.models import enliven
from model.inference.answerer import Answerer


@pytest.fixture
def questions(folder):
    asked = [("a.png", "Yes", "random"), ("b.png", "no", "random,popular"), ("c.png", "Yes", "popular")]
    records = [{"image": i, "question": f"Is {i} there?", "answer": a, "category": c} for i, a, c in asked]
    return read_questions(write_jsonl(folder / "exam.jsonl", records))


@pytest.mark.parametrize(
    ("answer", "said"),
    [("yes", "yes"), ("Yes, it is.", "yes"), ("No.", "no"), ("NO!", "no"), ("yes and no", None), ("", None),
     ("nobody knows", None), ("有", None)],
)  # fmt: skip
def test_yes_or_no(answer, said):
    assert yes_or_no(answer) == said


def test_figures_by_hand():
    """2 hits, 1 false alarm, 1 miss, 1 answer that is neither, 3 right refusals."""
    pairs = [("yes", "yes")] * 2 + [("no", "yes"), ("yes", "no"), ("yes", None)] + [("no", "no")] * 3
    found = figures(pairs)
    assert (found["accuracy"], found["yes_rate"], found["count"], found["failed"]) == (5 / 8, 3 / 8, 8, 1)
    assert (found["precision"], found["recall"]) == (round(2 / 3, 4), 0.5)
    assert found["f1"] == round(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5), 4)
    assert figures([("no", "no")])["f1"] == 0 and figures([])["accuracy"] is None


def test_categories_and_modes(questions, make_vlm, monkeypatch):
    assert (
        is_yes_no(questions) and not is_yes_no([]) and not is_yes_no([*questions, replace(questions[0], truth="cats")])
    )
    answers = {"right": ["yes", "no", "it is"], "shuffled": ["no"] * 3, "none": ["yes"] * 3}
    monkeypatch.setattr("dataset.exam.yes_no.answer_all", lambda answerer, asked, mode, wrong, size: answers[mode])
    report, records = score_yes_no(None, questions)
    assert report["all"]["right"]["count"] == 4 and report["all"]["right"]["accuracy"] == 0.75
    assert report["by_category"]["random"]["right"]["accuracy"] == 1
    assert report["by_category"]["popular"]["right"]["failed"] == 1
    assert report["all"]["none"]["yes_rate"] == 1 and report["all"]["shuffled"]["f1"] == 0
    assert [record["right"] for record in records] == answers["right"]
    rows = table(report).splitlines()
    assert [row[:18].strip() for row in rows[1:]] == [
        "right picture", "another picture", "no picture", "random", "popular",
    ]  # fmt: skip
    assert rows[1].split() == [
        "right",
        "picture",
        "0.750",
        "0.30",
        "to",
        "0.95",
        "1.000",
        "0.500",
        "0.667",
        "0.250",
        "1",
    ]


def test_a_real_model_is_asked(questions, make_vlm):
    report, records = score_yes_no(Answerer(enliven(make_vlm())), questions)
    assert report["all"]["right"]["count"] == 4 and all(isinstance(record["none"], str) for record in records)
