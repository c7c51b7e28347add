"""Which questions stand for all of a file: so many of each kind, evenly over its lines."""

import json
from collections import Counter

import pytest

from dataset.exam.figures import summarize
from dataset.exam.questions import evenly_spread, read_questions
from helpers.data import write_jsonl
from model.messages import UserError


def line(number: int, kind: str) -> dict:
    turns = [{"role": "user", "content": f"number {number}?"}, {"role": "assistant", "content": str(number)}]
    return {"conversations": turns, "kind": kind, "language": "en"}


def test_kinds_get_alike_and_what_a_rare_one_leaves_goes_to_the_others():
    groups = ["a"] * 50 + ["b"] * 50 + ["c"] * 3
    chosen = evenly_spread(groups, 31)
    assert Counter(groups[number] for number in chosen) == {"a": 14, "b": 14, "c": 3}
    assert chosen == sorted(set(chosen))
    steps = {after - before for before, after in zip(chosen[:14], chosen[1:14], strict=False)}
    assert chosen[0] == 0 and steps == {3, 4}


def test_neighbours_that_alternate_are_not_taken_for_one_kind():
    groups = [
        (kind, "en" if (number + place) % 2 else "zh") for number in range(20) for place, kind in enumerate("abc")
    ]
    chosen = Counter(groups[number] for number in evenly_spread(groups, 24))
    assert set(chosen.values()) == {4} and len(chosen) == 6


def test_more_than_there_are_are_all_and_what_is_unreadable_is_none():
    assert evenly_spread(["a", None, "b"], 9) == [0, 2]
    assert evenly_spread([None, None], 3) == evenly_spread([], 3) == []


def test_the_same_lines_of_a_file_each_time(tmp_path, capsys):
    path = write_jsonl(tmp_path / "asked.jsonl", [line(n, "rare" if n % 10 == 3 else "common") for n in range(100)])
    questions = read_questions(path, spread=12)
    assert [q.truth for q in questions] == [q.truth for q in read_questions(path, spread=12)]
    assert Counter(q.kind for q in questions) == {"common": 6, "rare": 6}
    assert len(read_questions(path)) == 100 and [q.truth for q in read_questions(path, limit=2)] == ["0", "1"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["no JSON", *lines[1:]]) + "\n")
    assert len(read_questions(path, spread=12)) == 12
    assert capsys.readouterr().err.startswith(f"left out 1 of 100 lines: {path}:1: ")
    path.write_text("no JSON\n" * 3)
    with pytest.raises(UserError, match="none of 3 lines can be used"):
        read_questions(path, spread=2)


def test_an_exam_with_the_right_picture_alone_has_one_figure(tmp_path):
    path = write_jsonl(tmp_path / "asked.jsonl", [line(n, "ab"[n % 2]) for n in range(4)])
    questions = read_questions(path)
    report = summarize(questions, {"right": ["0", "0", "2", "3"]})
    assert report["exact_match"] == {"right": 0.75} and report["all"]["right"]["count"] == 4
    assert report["not_shuffled"] == {"without_pictures": 0, "without_another": 0} and json.dumps(report)
