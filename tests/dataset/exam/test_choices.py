"""Questions with choices: which letter an answer names, and what each rule makes of a model's likelihoods."""

import json

import pytest

from dataset.exam.choices import BASE, RULES, letter_of, plain, score_choices, table
from dataset.exam.figures import MODES, wilson_interval
from dataset.exam.questions import read_questions
from helpers.data import write_jsonl
from helpers.models import enliven, make_decoder
from model.inference.answerer import Answerer, user_turn
from model.inference.likelihood import log_likelihoods

ANIMALS = ("a cat", "a dog", "a red panda", "none")


@pytest.fixture
def questions(folder):
    rows = [
        {"image": "a.png", "question": "What is it?", "answer": "B", "category": "animals"},
        {"image": "a.png", "question": "And what is there?", "answer": "A", "category": "animals", "hint": "It purrs."},
        {"image": "b.png", "question": "What lies there?", "answer": "D", "category": "things"},
        {"question": "What barks?", "answer": "B", "category": "things"},
    ]
    named = dict(zip("ABCD", ANIMALS, strict=True))
    return read_questions(write_jsonl(folder / "exam.jsonl", [{**row, **named} for row in rows]))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("The answer is: B.", "B"), ("B. a dog", "B"), ("b", None), ("A or B", None),
        ("A dog, as I would say of it, or not", "B"),  # the article is no answer where four words follow
        ("A RED PANDA", "A"),  # here it is: the rule's weak spot
        ("I see a dog", "B"), ("it's a Red Panda", "C"), ("a cat and a dog", None), ("D, I think", "D"), ("", None),
        ("it is a dog " + "and so on " * 10, None),  # longer than twice all choices
        ("E", None), ("**C**", "C"), ("a bird", None),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_names(answer, letter):
    assert letter_of(answer, ANIMALS) == letter


def test_the_plain_question_has_no_choices(questions):
    assert [plain(question).sample.messages[0]["content"] for question in questions] == [
        "<image>\nWhat is it?", "<image>\nIt purrs.\nAnd what is there?", "<image>\nWhat lies there?", "What barks?",
    ]  # fmt: skip


def test_each_rule_takes_what_it_says(questions, make_vlm):
    answerer = Answerer(enliven(make_vlm()))
    report, records = score_choices(answerer, questions, Answerer(make_decoder()), batch_size=3)
    for question, record in zip(questions, records, strict=True):
        pictures = question.sample.open_pictures()
        asked = [user_turn(plain(question).text, len(pictures))]
        found = log_likelihoods(answerer, [answerer.prompt(asked, pictures)] * 4, ANIMALS, with_end=True)
        named = [user_turn(question.text, len(pictures))]
        letters = log_likelihoods(answerer, [answerer.prompt(named, pictures)] * 4, "ABCD")
        picked = record["picked"]["right"]["letters"]
        assert picked["texts"] == "ABCD"[max(range(4), key=lambda n: found[n].total)] == record["right"]
        assert picked["per token"] == "ABCD"[max(range(4), key=lambda n: found[n].mean)]
        assert picked["letters"] == "ABCD"[max(range(4), key=lambda n: letters[n].total)]
        assert picked["generation"] == letter_of(record["picked"]["right"]["said"]["generation"], ANIMALS)
    assert [record["shuffled"] is None for record in records] == [False, False, False, True]
    assert {record["picked"]["right"]["letters"]["texts"] for record in records} != {None}
    check_report(report, records)
    assert json.loads(json.dumps(records))[0]["choices"] == list(ANIMALS)


def check_report(report: dict, records: list[dict]) -> None:
    groups = {"all": (report, records)}
    for name, part in report["by_category"].items():
        groups[name] = part, [record for record in records if record["category"] == name]
    assert list(groups) == ["all", "animals", "things"]
    for part, own in groups.values():
        for rule in RULES:
            figures = part["rules"][rule]
            for mode in (*MODES, BASE):
                letters = [(r["picked"][mode]["letters"][rule], r["truth"]) for r in own if r["picked"][mode]]
                right = sum(letter == truth for letter, truth in letters)
                assert figures[mode]["accuracy"] == round(right / len(letters), 4)
                assert figures[mode]["interval"] == wilson_interval(right, len(letters))
                assert figures[mode]["failed"] == sum(letter is None for letter, _ in letters)
            without, base = figures["none"]["accuracy"], figures[BASE]["accuracy"]
            assert figures["gain"] == pytest.approx(figures["right"]["accuracy"] - without, abs=1e-4)
            assert figures["leakage"] == pytest.approx(max(0, without - base), abs=1e-4)
    lines = table(json.loads(json.dumps(report))).splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == list(RULES)
    assert lines[0].split()[-2:] == ["gain", "leakage"] and lines[6] == "by category, texts:"
    assert lines[-2].startswith("asked for letters and generation, the first: 'Question: What is it?\\nOptions:\\nA. a")
    assert lines[-1] == "asked for the others, the first: 'What is it?'"


def test_without_a_base_there_is_no_leakage(questions, vlm):
    report, records = score_choices(Answerer(vlm), questions[3:])
    assert BASE not in records[0] and "leakage" not in report["rules"]["texts"]
    head, row, *_ = table(report).splitlines()
    assert head.split()[-1] == "gain" and " - " in row  # nothing to shuffle with
