"""Pairs are false in the way that they say, and preferences are what the model's own probabilities say."""

import random

import pytest

pytest.importorskip("trl", reason="tuning with TRL is tried by make test-trl")

import torch

from dataset.exam.questions import read_questions
from helpers.data import open_lines, turns
from model.config import IGNORE_INDEX
from model.inference.answerer import Answerer
from model.messages import UserError
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from scripts.tune.pairs import SOURCES, _other_order, make_pairs, preference, preferred


@pytest.fixture(scope="module")
def pairs(folder, data):
    return make_pairs(read_questions(data), Answerer.from_weight(folder), seed=3, sources=SOURCES)


def test_every_pair_is_false_in_its_way(pairs):
    sources = {source: [pair for pair in pairs if pair.source == source] for source in ("another", "order", "own")}
    assert all(pair.rejected != pair.question.truth for pair in pairs)
    assert len(sources["another"]) == 24  # every question here is answered in two ways
    assert {(pair.question.text, pair.question.truth, pair.rejected) for pair in sources["another"]} == {
        ("What is it?", "a cat", "a dog"), ("What is it?", "a dog", "a cat"), ("有什么？", "猫、狗", "牛"),
        ("What is there?", "cat, dog, cow", "cow, cat"), ("What is there?", "cow, cat", "cat, dog, cow"),
        ("有什么？", "牛", "猫、狗"),
    }  # fmt: skip
    assert {pair.question.truth for pair in sources["order"]} == {"cat, dog, cow", "cow, cat", "猫、狗"}
    assert len(sources["own"]) > 20  # random weights are rarely right


def test_another_order_has_the_same_things_and_the_same_marks():
    orders = {_other_order("cat, dog, cow", random.Random(seed)) for seed in range(40)}
    assert orders == {"cat, cow, dog", "dog, cat, cow", "dog, cow, cat", "cow, cat, dog", "cow, dog, cat"}
    assert _other_order("猫、狗", random.Random(0)) == "狗、猫"
    assert _other_order("cat", random.Random(0)) is None and _other_order("cat, cat", random.Random(0)) is None


@torch.no_grad()
def test_preferred_is_what_the_model_itself_finds_likelier(pairs, folder, seeing):
    processor = VLMProcessor.for_config(seeing.config, load_tokenizer())

    def log_probability(pair, answer: str) -> float:
        messages = [*pair.question.sample.messages[:-1], {"role": "assistant", "content": answer}]
        rendered = processor.render(messages)
        inputs = processor.prompt_inputs([(rendered, pair.question.sample.open_pictures())])
        logits, labels = seeing(**inputs).logits[0, :-1], torch.as_tensor(rendered.labels)
        told = labels[1:] != IGNORE_INDEX
        return logits.log_softmax(-1)[told].gather(-1, labels[1:][told][:, None]).sum().item()

    asked = pairs[::3]
    expected = [log_probability(pair, pair.question.truth) > log_probability(pair, pair.rejected) for pair in asked]
    assert preferred(folder, asked) == expected and 0 < sum(expected) < len(expected)
    said = preference(folder, asked)
    assert said.startswith(f"{sum(expected) / len(asked):.3f} of {len(asked)} pairs (another ")


def test_no_pair_at_all_is_said(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("scripts.tune.pairs._own_mistakes", lambda questions, *_: [None] * len(questions))
    (sample,) = open_lines(tmp_path, {"conversations": turns(0)})
    with pytest.raises(UserError, match="no false answer was found"):
        make_pairs(read_questions(tmp_path / "train.jsonl"), None, 0, ["another", "order"])
    assert sample.messages[-1]["content"] == "a cat"
