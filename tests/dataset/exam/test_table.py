"""An exam that is written as a table asks the same questions when it is read again."""

import pytest

from dataset.exam.questions import read_questions
from dataset.exam.table import write_table
from helpers.data import turns, write_jsonl
from model.messages import UserError


def asked(questions: list) -> list[tuple]:
    contents = [
        tuple(p if isinstance(p, bytes) else p.read_bytes() for p in question.sample.pictures) for question in questions
    ]
    return [
        (q.text, q.truth, q.kind, q.language, q.choices, content)
        for q, content in zip(questions, contents, strict=True)
    ]


def test_questions_come_back(folder):
    talk = [{"role": "user", "content": '<image>\nWhat "is"\tit?\n'}, {"role": "assistant", "content": "a, cat"}]
    records = [
        {"image": "a.png", "kind": "what", "language": "en", "conversations": talk},
        {"image": "a.png", "kind": "where", "language": "zh", "conversations": turns(1)},
        {"image": "b.png, c.png", "kind": "where", "language": "en", "conversations": turns(2)},
        {"kind": "what", "language": "en", "conversations": turns(0)},
        {"kind": "what", "language": "en", "conversations": turns(0)},
    ]
    questions = read_questions(write_jsonl(folder / "exam.jsonl", records))
    write_table(questions, folder / "exam.tsv")
    again = read_questions(folder / "exam.tsv")
    assert asked(again) == asked(questions)
    assert [question.category for question in again] == ["what", "where", "where", "what", "what"]
    assert [question.sample.messages[0]["content"][:17] for question in again[1:3]] == [
        "<image>\nWhat is i", "<image><image>\nWh",
    ]  # fmt: skip
    cells = [line.split("\t")[1] for line in (folder / "exam.tsv").read_text().splitlines()[-4:]]
    assert cells[0] == "0" and cells[1].startswith("['iVBOR") and cells[2:] == ["", ""]


def test_choices_come_back(folder):
    record = {
        "image": "a.png",
        "question": "What is it?",
        "A": "cat",
        "B": "dog",
        "category": "animals",
        "hint": "It barks.",
    }
    records = [{**record, "answer": "B"}, {**record, "C": "both", "answer": "C", "category": "more"}]
    questions = read_questions(write_jsonl(folder / "exam.jsonl", records))
    assert [(question.truth, question.choices) for question in questions] == [
        ("B", ("cat", "dog")), ("C", ("cat", "dog", "both")),
    ]  # fmt: skip
    write_table(questions, folder / "exam.tsv")
    again = read_questions(folder / "exam.tsv")
    assert asked(again) == asked(questions) and again[0].text.startswith("Hint: It barks.\nQuestion: What is it?\n")
    assert [question.category for question in again] == ["animals", "more"]


def test_a_conversation_has_no_row(folder):
    talk = [*turns(1), {"role": "user", "content": "And?"}, {"role": "assistant", "content": "no"}]
    path = write_jsonl(folder / "exam.jsonl", [{"image": "a.png", "conversations": talk}])
    with pytest.raises(UserError, match=r"exam\.jsonl:1: a row of a table holds one question .* 4 turns"):
        write_table(read_questions(path), folder / "exam.tsv")
    assert not list(folder.glob("*.tsv*"))
