"""VLMEvalKit itself, offline on a CPU: it asks our engine what score.py asks, and reads off and counts what we do."""

import importlib.util
import json
import random
import sys

import pytest

if not importlib.util.find_spec("vlmeval"):
    pytest.skip("VLMEvalKit is not installed: requirements/vlmeval.txt", allow_module_level=True)

from dataset.exam.answering import score
from dataset.exam.choices import letter_of, score_choices
from dataset.exam.questions import read_questions
from dataset.exam.yes_no import score_yes_no, yes_or_no
from helpers.data import make_picture, write_jsonl
from helpers.models import enliven
from model.inference.answerer import Answerer
from model.weights import save_weights
from scripts.judge import vlmevalkit
from scripts.judge.stand_ins import stand_ins

with stand_ins("vlmeval"):
    from vlmeval.dataset.utils.yorn import YOrN_Extraction
    from vlmeval.utils.matching_util import can_infer

NAMES = [f"{number}.png" for number in range(6)]
CHOICES = {"A": "a cat", "B": "a bird", "C": "two 猫", "D": "12"}


@pytest.fixture
def weights(make_vlm, tmp_path):
    path = tmp_path / "out" / "lively.safetensors"
    save_weights(enliven(make_vlm()), path, {"stage": "sft_vlm"})
    return path


@pytest.fixture
def judge(weights, tmp_path, monkeypatch):
    """judge(records, flags): questions as score.py reads them, and what VLMEvalKit made of each."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(NAMES):
        make_picture(number).save(tmp_path / "images" / name)

    def run(records: list[dict], *flags: str) -> tuple[list, list[dict], dict]:
        path = write_jsonl(tmp_path / "exam.jsonl", records)
        output = tmp_path / "judged"
        given = ["--model", weights, "--data", path, "--output", output, "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", ["vlmevalkit.py", *map(str, given), *flags])
        vlmevalkit.main()
        judged = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
        return read_questions(path), judged, json.loads((output / "report.json").read_text())

    return run


@pytest.fixture
def answerer(weights):
    return Answerer.from_weight(weights, device="cpu", dtype="float32")


def asked(answer: str, **more: str) -> list[dict]:
    return [{"image": name, "question": f"What is {name[0]}?", "answer": answer, **more} for name in NAMES]


def test_exact_match(judge, answerer, capsys):
    first = score(answerer, judge(asked("a cat"))[0])[1]
    records = [{**row, "answer": said["right"]} for row, said in zip(asked("x"), first, strict=True)]
    records[2]["answer"] += "!"
    questions, judged, report = judge([*records, {"question": "What is two?", "answer": "2"}])
    expected = score(answerer, questions)[1][:6]
    assert [row["said"] for row in judged] == [row["right"] for row in expected]
    assert [row["right"] for row in judged] == [True, True, False, True, True, True]
    assert (report["all"]["right"], report["all"]["count"], report["without_pictures"]) == (5, 6, 1)
    said = capsys.readouterr().out
    assert "harness             VLMEvalKit (ms-vlmeval 0.0.20" in said and "left out by it      1 question" in said
    assert "first prompt        '<image>\\nWhat is 0?'" in said and "temperature 0, at most 64 tokens" in said


@pytest.mark.parametrize("rule", ["generation", "plain generation"])
def test_choices(rule, judge, answerer):
    flags = ["--plain"] if rule.startswith("plain") else []
    questions, judged, report = judge(asked("C", **CHOICES), *flags)
    ours, records = score_choices(answerer, questions)
    picked = [record["picked"]["right"] for record in records]
    assert [row["said"] for row in judged] == [one["said"][rule] for one in picked]
    assert [row["right"] for row in judged] == [one["letters"][rule] == "C" for one in picked]
    assert [row["failed"] for row in judged] == [one["letters"][rule] is None for one in picked]
    prompt = ours["prompts"]["the others" if flags else "letters and generation"]
    assert report["first_prompt"] == f"<image>\n{prompt}"


def test_yes_and_no(judge, answerer):
    questions, judged, report = judge(asked("yes", category="popular"))
    ours, records = score_yes_no(answerer, questions)
    assert [row["said"] for row in judged] == [record["right"] for record in records]
    assert report["all"]["failed"] == ours["all"]["right"]["failed"]
    assert report["all"]["accuracy"] == ours["all"]["right"]["accuracy"]


def test_letters_and_yes_or_no_are_read_off_alike():
    """Answers of words that the rules look at, in any order."""
    rng, letters = random.Random(1), "ABCD"
    words = [*letters, "a", "cat", "a cat", "red cat", "Dog", "dog", "yes", "No.", "(B)", "C.", "the", "is", "-", "*A*"]
    choices = ("cat", "red cat", "Dog", "one dog or two")
    found = set()
    for _ in range(4000):
        between = rng.choice((" ", ", ", ""))
        answer = between.join(rng.choices(words, k=rng.randint(0, 8)))
        theirs = can_infer(answer, dict(zip(letters, choices, strict=True)))
        assert letter_of(answer, choices) == (theirs or None), answer
        if between:  # it takes full stops out, and words that stood around one become one
            assert (yes_or_no(answer) or "unknown") == YOrN_Extraction(answer).lower(), answer
        found.add(theirs)
    assert found == {False, *letters}


def test_what_the_harness_cannot_load_is_told_with_the_end_of_its_log(judge, weights, monkeypatch):
    weights.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="VLMEvalKit found nothing .* its log ends with"):
        judge(asked("a cat"))
