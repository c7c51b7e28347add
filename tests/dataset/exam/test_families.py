"""An exam in families beside a count by hand: kinds alike in each, and which facts of captions are true."""

from pathlib import Path

import pytest

from dataset.exam.families import in_families, score_families, table
from dataset.exam.questions import NO_CATEGORY, Question
from dataset.samples import Sample

CAPTION = "One thing on a red ground: cat at the top left."
OTHER = "One thing on a blue ground: cat at the top left."
ASKED = [  # category, kind, truth; answers with the right picture, with another one, with none
    ("trained", "at", "cat", "cat", "dog", "dog"),
    ("trained", "at", "dog", "cat", "dog", "dog"),
    ("trained", "count", "two", "two", "one", "one"),
    ("captions", "caption", CAPTION, CAPTION, OTHER, "a cat"),
    ("captions", "caption", CAPTION, OTHER, None, "a cat"),
    ("trained", "count", "one", "one", "one", "one"),
]


def question(number: int, category: str, kind: str, truth: str) -> Question:
    turns = [{"role": "user", "content": f"<image>\nQuestion {number}?"}, {"role": "assistant", "content": truth}]
    return Question(Sample(f"exam.jsonl:{number}", turns, (Path(f"{number}.jpg"),)), truth, kind, "en", category)


@pytest.fixture
def scored(monkeypatch) -> tuple[dict, list[dict]]:
    answers = {mode: [row[3 + place] for row in ASKED] for place, mode in enumerate(("right", "shuffled", "none"))}
    monkeypatch.setattr("dataset.exam.answering.answer_all", lambda answerer, asked, mode, wrong, size: answers[mode])
    return score_families(None, [question(number, *row[:3]) for number, row in enumerate(ASKED)], batch_size=2)


def test_a_line_that_names_a_family_makes_an_exam_of_families():
    plain = [question(number, NO_CATEGORY, "at", "cat") for number in range(2)]
    assert not in_families(plain) and not in_families([])
    assert in_families([*plain, question(2, "many", "at", "cat")])


def test_figures_of_families_by_hand(scored):
    report, records = scored
    assert list(report["by_category"]) == ["trained", "captions"]
    trained, captions = report["by_category"].values()
    assert trained["exact_match"] == {"right": 0.75, "shuffled": 0.5, "none": 0.5}  # means of two kinds
    assert trained["by_kind"]["at"]["right"]["exact_match"] == 0.5 and trained["all"]["right"]["count"] == 4
    assert "facts" not in trained
    assert captions["exact_match"] == {"right": 0.5, "shuffled": 0.0, "none": 0.0}
    assert captions["all"]["shuffled"]["count"] == 1
    whole, none = {"precision": 1.0, "recall": 1.0}, {"precision": None, "recall": 0.0}
    half = {"precision": 0.5, "recall": 0.5}
    assert captions["facts"]["right"] == {"things": whole, "places": whole, "ground": half, "count": whole}
    assert captions["facts"]["shuffled"]["ground"] == {"precision": 0.0, "recall": 0.0}  # of the one that was asked
    assert captions["facts"]["none"] == dict.fromkeys(("things", "places", "ground", "count"), none)
    assert report["exact_match"]["right"] == round((0.5 + 1.0 + 0.5) / 3, 4)  # kinds of all families alike
    assert [record["category"] for record in records] == [row[0] for row in ASKED]
    assert [record["shuffled"] for record in records] == [row[4] for row in ASKED]


def test_a_row_a_family_and_under_it_its_kinds_or_facts(scored):
    rows = table(scored[0]).splitlines()
    assert [row[:24].strip() for row in rows[:6]] == ["", "trained", "at", "count", "captions", "facts, right picture:"]
    assert [figure for figure in rows[1].split() if figure.count(".") == 1 and len(figure) == 5] == [
        "0.750", "0.500", "0.500",
    ]  # fmt: skip
    assert rows[2].split()[:2] == ["at", "0.500"] and rows[4].split()[:2] == ["captions", "0.500"]
    assert rows[5].startswith("  facts, right picture: things 1.00 of those said, 1.00 of those true, places 1.00")
    assert rows[5].endswith(
        "ground 0.50 of those said, 0.50 of those true, count 1.00 of those said, 1.00 of those true"
    )
    assert rows[6].startswith("  facts, another picture: ")
    assert rows[7].startswith("  facts, no picture: things - of those said, 0.00 of those true") and len(rows) == 8
