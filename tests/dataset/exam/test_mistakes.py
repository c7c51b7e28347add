"""Wrong answers: which they are, how sure the model was of them, and where it looked."""

import math

import pytest
import torch

from dataset.exam.answering import prompt_of, score
from dataset.exam.choices import plain, score_choices
from dataset.exam.mistakes import worst_mistakes, wrong_answers
from dataset.exam.questions import read_questions
from dataset.exam.yes_no import score_yes_no
from helpers.data import write_jsonl
from helpers.models import enliven
from model.inference.answerer import Answerer
from model.inference.attention_map import look
from model.inference.likelihood import log_likelihoods


@pytest.fixture
def answerer(make_vlm):
    return Answerer(enliven(make_vlm()))


def test_the_surest_comes_first_with_a_map_of_where_it_looked(folder, answerer):
    lines = [{"image": f"{name}.png", "question": f"What is {name}?", "answer": "a cat"} for name in "abc"]
    questions = read_questions(write_jsonl(folder / "held_out.jsonl", [*lines, {"question": "Why?", "answer": "so"}]))
    _, records = score(answerer, questions)
    records[1]["right"] = "a cat"
    worst, count = worst_mistakes(answerer, questions, records, 40)
    assert count == len(worst) == 3 and "b.png" not in {str(one.question.sample.pictures) for one in worst}
    assert [one.sureness for one in worst] == sorted((one.sureness for one in worst), reverse=True)
    for one in worst:
        prompt = prompt_of(answerer, one.question, "right", one.question)
        found = log_likelihoods(answerer, [prompt], [one.said], with_end=True)[0]
        assert one.sureness == pytest.approx(math.exp(found.total)) and one.truth in ("a cat", "so")
        if one.question.sample.pictures:
            (seen,) = look(answerer.model, prompt, answerer.processor.encode(one.said)).maps()
            assert len(one.maps) == 1 and seen.shape == (2, 2) and torch.equal(one.maps[0], seen)
        else:
            assert one.maps is None
    first, all_of_them = worst_mistakes(answerer, questions, records, 1)
    assert all_of_them == 3 and [one.question for one in first] == [worst[0].question]


def test_an_answer_of_nothing_is_a_mistake_like_others(folder, answerer):
    line = {"image": "a.png", "question": "What?", "answer": "a cat"}
    questions = read_questions(write_jsonl(folder / "held_out.jsonl", [line]))
    worst, _ = worst_mistakes(answerer, questions, [{"right": "", "truth": "a cat"}], 40)
    assert 0 <= worst[0].sureness <= 1 and worst[0].maps[0].shape == (2, 2)


def test_an_answer_that_fills_the_window_comes_last(folder, answerer):
    line = {"image": "a.png", "question": "What?", "answer": "a cat"}
    questions = read_questions(write_jsonl(folder / "held_out.jsonl", [line, line]))
    answerer.max_length = len(prompt_of(answerer, questions[0], "right", questions[0]).ids) + 2
    records = [{"right": text, "truth": "a cat"} for text in ("a b c d e", "a")]
    worst, _ = worst_mistakes(answerer, questions, records, 40)
    assert [one.said for one in worst] == ["a", "a b c d e"] and worst[1].sureness == 0


def test_choices_are_told_by_their_texts_and_asked_without_them(folder, answerer):
    line = {"image": "a.png", "question": "What?", "A": "a cat", "B": "a dog", "answer": "A"}
    questions = read_questions(write_jsonl(folder / "held_out.jsonl", [line, {**line, "answer": "B"}]))
    _, records = score_choices(answerer, questions)
    (wrong,) = wrong_answers(questions, records)  # both have one picture, and get one answer
    assert {wrong[1], wrong[2]} == {"a cat", "a dog"}
    assert wrong[0].text == plain(questions[0]).text == "What?"


def test_yes_and_no_are_read_as_the_measures_read_them(folder, answerer):
    lines = [{"image": "a.png", "question": "Is it?", "answer": answer} for answer in ("Yes", "No", "No")]
    questions = read_questions(write_jsonl(folder / "pope.jsonl", lines))
    _, records = score_yes_no(answerer, questions)
    for record, said in zip(records, ("Yes, it is.", "Yes, it is.", "Maybe."), strict=True):
        record["right"] = said
    assert [(said, truth) for _, said, truth in wrong_answers(questions, records)] == [
        ("Yes, it is.", "No"), ("Maybe.", "No"),
    ]  # fmt: skip
