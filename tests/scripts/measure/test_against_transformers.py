"""The race against transformers' Trainer and generate(), at toy sizes: the same labels, the same tokens, the ratios."""

import json

import pytest
import torch

from helpers.data import make_picture, turns, write_jsonl
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS, SIZES, VISION_SIZES
from model.config import IGNORE_INDEX
from model.processing import VLMProcessor
from scripts.measure import against_transformers as race
from scripts.measure import stock_way
from scripts.measure.stock_way import Collator, StockRun, train_with_trainer

VOCABULARY = 7000  # more than the shipped tokenizer has


def write_data(folder, sft: int) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(sft):
        make_picture(number).save(folder / f"images/{number}.png")
        answers = ("a cat", "two dogs and a bird")
        lines += [{"image": f"{number}.png", "conversations": turns(1, answer)} for answer in answers]
    write_jsonl(folder / "sft.jsonl", lines)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Options at toy sizes, and what they prepare."""
    monkeypatch.setattr(race, "build_data", write_data)
    monkeypatch.setattr(race, "SMOLLM2_135M", {**SIZES, "vocab_size": VOCABULARY})
    monkeypatch.setattr(race, "CLIP_VIT_B16", VISION_SIZES)
    monkeypatch.setattr(race, "QUESTIONS", 2)
    options = race.parse_options(["--prompts", "2", "--new_tokens", "6", "--threads", "1", "--steps", "2"])
    return options, race.prepare(options, tmp_path)


def test_trainer_gets_the_labels_that_our_stage_learns(prepared, tokenizer):
    _, subject = prepared
    processor = stock_way.AutoProcessor.from_pretrained(subject.stock)
    samples = subject.samples()[:2]
    batch = Collator(processor, IMAGE_TOKENS)(samples)
    ours = VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE)
    picture = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row, sample in enumerate(samples):
        rendered = ours.render(sample.messages)
        there = batch["attention_mask"][row].bool()
        learnt = batch["labels"][row] != IGNORE_INDEX
        assert (batch["input_ids"][row] == picture).sum() == IMAGE_TOKENS
        wanted = rendered.input_ids[rendered.trained].tolist()
        # its template gives no mask of what is learnt, so that the line break after an answer is learnt as well
        assert batch["labels"][row][learnt].tolist()[: len(wanted)] == wanted and learnt.sum() <= len(wanted) + 1
        found = batch["input_ids"][row][there]
        assert torch.where(found == picture, 34, found).tolist() == rendered.input_ids.tolist()
    assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_answers_are_raced_on_the_same_tokens(prepared, tmp_path, capsys):
    options, subject = prepared
    figures = race.measure_answers(subject, options)
    best = figures["generate_best"]
    assert figures["ours_ratio"] == figures["ours"] / figures[f"generate_{best}"]
    assert figures[f"generate_{best}"] == max(figures.get(f"generate_{name}", 0) for name in ("float32", "bfloat16"))
    assert "answers, ours" in capsys.readouterr().out


def test_answers_that_differ_are_no_race(prepared, monkeypatch):
    options, subject = prepared
    answer = stock_way.StockAnswers.answer
    monkeypatch.setattr(stock_way.StockAnswers, "answer", lambda *a: (*answer(*a)[:2], [1] * 6))
    with pytest.raises(ValueError, match="ours says .* generate"):
        race.measure_answers(subject, options)


def test_transformers_trainer_learns_from_the_stock_folder(prepared):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    _, subject = prepared
    run = StockRun(subject.stock, subject.data, 2, 2, 1, subject.bfloat16, threads=1)
    assert train_with_trainer(run) > 0


def test_training_is_raced_in_turns(prepared, monkeypatch, tmp_path, capsys):
    _, subject = prepared
    monkeypatch.setattr(race, "prepare", lambda *_: subject)
    monkeypatch.setattr(race, "check_accelerate", lambda: None)
    speeds, asked = {"none": 12.0, "float16": 20.0}, []
    monkeypatch.setattr(race, "train_ours", lambda _, cached, *rest: asked.append(cached) or speeds[cached])
    monkeypatch.setattr(race, "in_a_process", lambda work, run: asked.append(run.conversations) or 4.0)
    race.main(["--parts", "training", "--rounds", "2", "--json", str(tmp_path / "found.json")])
    assert asked == ["none", "float16", 2] * 2
    figures = json.loads((tmp_path / "found.json").read_text())
    assert (figures["training"]["online_ratio"], figures["training"]["cached_ratio"]) == (3, 5)
    assert {"torch", "transformers"} <= figures["versions"].keys() and figures["settings"]["batch_size"] == "2"
    assert "training, cached: 5.00 x transformers' speed, bar 3" in capsys.readouterr().out


def test_a_missing_package_is_said_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(stock_way.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(race, "prepare", None)
    with pytest.raises(SystemExit, match="against_transformers: .* needs the package accelerate: python -m pip"):
        race.main(["--parts", "training"])
