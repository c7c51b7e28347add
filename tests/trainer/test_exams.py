"""Exams while training: it goes on as without them, they choose the best weights, and their failure is no loss."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dataset.exam.answering import answer_all
from dataset.exam.choices import RULES, pick_all
from dataset.exam.emoji_choices import emoji_choices
from dataset.exam.questions import read_questions
from dataset.exam.table import write_table
from helpers.data import write_jsonl
from helpers.faults import digest_of_tensors, outcome, run_ranks, said_by
from helpers.models import enliven
from helpers.runs import records, refusal, run_until, status_of, tiny, write_texts
from model.inference.answerer import Answerer
from model.weights import save_weights
from scripts.status import describe
from trainer import exams, stage
from trainer.checkpoint import resume, saver
from trainer.checkpoint.files import checkpoints_in, read_manifest
from trainer.config import StageConfig
from trainer.exams import ExamFailed, Marks, twin_of
from trainer.train_llm import LLM
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def asked(data_folder) -> str:
    """Ten of the training questions in a folder of their own, of two kinds."""
    folder = data_folder / "exam"
    shutil.copytree(data_folder / "images", folder / "images")
    lines = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()[:10]]
    return str(write_jsonl(folder / "asked.jsonl", [{**line, "kind": f"k{n % 2}"} for n, line in enumerate(lines)]))


@pytest.fixture
def talkative(make_vlm, data_folder) -> dict:
    """Flags of a run that begins with weights of varied answers, and hardly changes them."""
    save_weights(enliven(make_vlm()), data_folder / "lively.safetensors")
    return {"from_weight": str(data_folder / "lively.safetensors"), "learning_rate": 1e-6}


def without_exams(outcome_of: dict) -> dict:
    return {**outcome_of, "log": [line for line in outcome_of["log"] if "exam" not in line]}


def exams_in(config: StageConfig) -> dict[int, float]:
    return {record["step"]: record["exam"] for record in records(config) if "exam" in record}


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1, "num_workers": 1},
        {"dropout": 0.1, "dtype": "bfloat16", "checkpoint_activations": 1},
        {"use_moe": 1, "optimizer": "muon", "cache_features": "int8"},
        {"eval_interval": 2, "eval_samples": 4, "val_samples": 0, "accumulation_steps": 2},
    ],
    ids=str,
)
def test_training_goes_on_to_the_bit_as_without_exams(changes, asked, data_folder, tower_folder):
    settings = {"batch_size": 4, "val_samples": 2, "save_interval": 2, "epochs": 2, **changes}
    runs = [
        tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / name), eval_tasks=tasks, **settings)
        for name, tasks in (("with", asked), ("without", ""))
    ]
    for config in runs:
        stage.run_stage(config)
    assert len(exams_in(runs[0])) >= 3 and not exams_in(runs[1])
    assert without_exams(outcome(runs[0])) == outcome(runs[1])


def test_the_twin_is_beside_what_trains(make_vlm):
    model = make_vlm(dropout=0.5).train()
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    random, modules = torch.get_rng_state(), [type(module) for module in model.modules()]
    twin = twin_of(model, model.state_dict())
    Answerer(twin, "cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), random) and model.training and not twin.training
    assert [type(module) for module in model.modules()] == modules  # the tower's layers are packed in the twin alone
    assert model.model.layers[0]._compiled_call_impl and not twin.model.layers[0]._compiled_call_impl
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in twin.state_dict().items()}.items() >= places.items()
    twin_of(model, model.state_dict()).to(torch.bfloat16)  # as the engine does to a model on a GPU
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_answers_are_those_that_the_saved_weights_give(asked, talkative, data_folder, tower_folder, monkeypatch):
    given = []
    monkeypatch.setattr(exams, "answer_all", lambda *a, **k: given.append(answer_all(*a, **k)) or given[-1])
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=asked, **talkative)
    stage.run_stage(config)
    (during,) = given
    answerer = Answerer.from_weight(config.weight_path, device="cpu", dtype="float32")
    assert during == answer_all(answerer, read_questions(Path(asked)), "right", (), 48)
    assert len(set(during)) > 3


def test_what_a_decoder_learns_shows_in_the_log_the_status_and_the_files(data_folder, tower_folder, capsys):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a cat."}]
    easy = write_jsonl(data_folder / "easy.jsonl", [{"conversations": turns}])
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody knows."}]
    hard = write_jsonl(data_folder / "hard.jsonl", [{"conversations": turns}] * 3)
    config = tiny(
        LLM, data_folder, tower_folder, data_path=str(write_texts(data_folder)), epochs=16, save_interval=32,
        eval_interval=16, eval_tasks=f"{easy}:3,{hard}",
    )  # fmt: skip
    stage.run_stage(config)
    said = capsys.readouterr().out
    marks = exams_in(config)
    assert list(marks) == [16, 32, 48] and marks[16] == 0 and marks[48] == 0.75  # 3 of 4 by weight
    (last,) = [record for record in records(config) if record["step"] == 48 and "exam" in record]
    assert last == {"step": 48, "exam": 0.75, "exam/easy": 1.0, "exam/hard": 0.0}
    assert "exam easy: 1 question\n" in said and "exam hard: 3 questions" in said
    assert "step 48: exam 0.7500" in said and "easy 1.0000 of 1 question, hard 0.0000 of 3 questions" in said
    mark = status_of(config)["exams"]
    assert (mark["step"], mark["mean"], mark["each"]["hard"]["count"]) == (48, 0.75, 3)
    assert "exams of step 48: 0.750; easy 1.000 (0.21 to 1.00), hard 0.000" in describe(config.run_dir, 40)
    assert read_manifest(checkpoints_in(config.run_dir / "checkpoints")[-1])["exam"] == 0.75


def test_choices_are_asked_by_the_first_rule_of_the_score(talkative, data_folder, tower_folder):
    questions = emoji_choices(8)
    write_table(questions, data_folder / "choices.tsv")
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=str(data_folder / "choices.tsv"), **talkative)
    stage.run_stage(config)
    answerer = Answerer.from_weight(config.weight_path, device="cpu", dtype="float32")
    asked = read_questions(data_folder / "choices.tsv")
    picked = pick_all(answerer, asked, "right", (), 16)
    right = [one.letters[RULES[0]] == question.truth for one, question in zip(picked, asked, strict=True)]
    (last,) = [record for record in records(config) if "exam" in record]
    assert last["exam/choices"] == pytest.approx(exact_match_of(asked, right), abs=1e-4)
    assert len({one.letters[RULES[0]] for one in picked}) > 1


def test_boxes_that_fit_are_right(data_folder, tower_folder, monkeypatch):
    lines = [{"image": "0_0.png", "question": "Where?", "answer": f"<box> 0 0 {side} 50"} for side in (50, 60, 10, 20)]
    asked = write_jsonl(data_folder / "boxes.jsonl", lines)
    monkeypatch.setattr(exams, "answer_all", lambda *a, **k: ["<box> 0 0 50 50"] * 3 + ["left"])
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=str(asked))
    stage.run_stage(config)
    assert set(exams_in(config).values()) == {0.5}


def exact_match_of(questions: list, right: list[bool]) -> float:
    """The mean over kinds."""
    kinds = {question.kind for question in questions}
    of_kind = [[one for one, q in zip(right, questions, strict=True) if q.kind == kind] for kind in kinds]
    return sum(sum(of) / len(of) for of in of_kind) / len(kinds)


# the best


def marks_of(mean: float) -> Marks:
    return Marks(mean, {})


def test_the_best_is_by_the_exams_then_by_the_validation_loss(asked, data_folder, tower_folder, monkeypatch):
    """Six steps: the first fails, two are alike but for the loss, the last is worse than both."""
    means = iter([None, 0.25, 0.5, 0.5, 0.5, 0.375])
    losses = iter([0.5, 4.0, 3.0, 2.0, 2.5, 1.0])

    def take(*_):
        mean = next(means)
        if mean is None:
            raise ExamFailed("for a test")
        return marks_of(mean)

    monkeypatch.setattr(saver, "take_exams", take)
    monkeypatch.setattr(saver, "validation_loss", lambda *_: next(losses))
    settings = {"batch_size": 4, "val_samples": 2, "save_interval": 2, "eval_interval": 1, "keep_last": 1}
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=asked, **settings)
    kept, original = {}, saver.save_weights

    def save_and_remember(model, path, facts, tensors):
        kept.setdefault(Path(path).stem, []).append(int(facts["step"]))
        original(model, path, facts, tensors)

    monkeypatch.setattr(saver, "save_weights", save_and_remember)
    run_until(config, 4, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1))  # from step 4, whose exam is remembered
    assert kept == {"sft_vlm_32": [2, 4, 5], "sft_vlm_32_best": [2, 3, 4]}
    names = [path.name for path in checkpoints_in(config.run_dir / "checkpoints")]
    assert names == ["step-00000004", "step-00000005"]  # the best is kept although --keep_last is 1


def test_other_exams_choose_the_best_anew(asked, data_folder, tower_folder, monkeypatch, capsys):
    means = itertools.chain([0.9, 0.9, 0.2], itertools.repeat(0.1))
    monkeypatch.setattr(saver, "take_exams", lambda *_: marks_of(next(means)))
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=asked, batch_size=4, save_interval=2)
    run_until(config, 5, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1, eval_samples=4))
    said = capsys.readouterr().out
    assert "the exams are not those of before: the best is chosen anew" in said and "exam 0.2000, the best" in said


def test_a_checkpoint_from_before_there_were_exams_is_gone_on_from(asked, data_folder, tower_folder, monkeypatch):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=4, save_interval=2)
    run_until(config, 3, monkeypatch)
    original = resume.load_state
    old = ("best_exam", "exams")
    monkeypatch.setattr(resume, "load_state", lambda path: {k: v for k, v in original(path).items() if k not in old})
    stage.run_stage(dataclasses.replace(config, from_resume=1, eval_tasks=asked))
    assert list(exams_in(config)) == [4, 6] and config.best_path.exists()


@pytest.mark.parametrize("eval_interval", [0, 3])
def test_a_stopped_run_with_exams_equals_an_unbroken_one(eval_interval, asked, data_folder, tower_folder, monkeypatch):
    settings = {"batch_size": 4, "dropout": 0.1, "val_samples": 2, "save_interval": 2, "epochs": 2}
    settings |= {"eval_tasks": asked, "eval_interval": eval_interval}
    unbroken = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "unbroken"), **settings)
    stage.run_stage(unbroken)
    broken = tiny(SFT_VLM, data_folder, tower_folder, **settings)
    for steps in (3, 4):
        run_until(broken, steps, monkeypatch)
        broken = dataclasses.replace(broken, from_resume=1)
    stage.run_stage(broken)
    assert outcome(broken) == outcome(unbroken)
    assert digest_of_tensors(broken.best_path) == digest_of_tensors(unbroken.best_path)


# what goes wrong


def test_an_exam_that_fails_costs_nothing_but_itself(asked, data_folder, tower_folder, monkeypatch, capsys):
    """Its pictures are taken away after the first one."""
    settings = {"batch_size": 4, "save_interval": 2, "val_samples": 2}
    undisturbed = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "undisturbed"), **settings)
    stage.run_stage(undisturbed)
    original = saver.take_exams

    def take_once(*arguments):
        marks = original(*arguments)
        shutil.rmtree(Path(asked).parent / "images")
        return marks

    monkeypatch.setattr(saver, "take_exams", take_once)
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=asked, **settings)
    monkeypatch.setattr(shutil, "rmtree", lambda path, rmtree=shutil.rmtree: rmtree(path, ignore_errors=True))
    stage.run_stage(config)
    said = capsys.readouterr().out
    assert said.count("the exams failed (BadSample: ") == 2 and "training goes on, the next ones try again" in said
    assert status_of(config)["state"] == "done" and status_of(config)["exams"]["step"] == 2
    assert list(exams_in(config)) == [2] and without_exams(outcome(config)) == outcome(undisturbed)


def test_weights_that_compute_no_number_fail_an_exam_in_one_line(asked, data_folder, tower_folder, capsys):
    config = tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=asked)

    def spoiled(model, tensors):
        return twin_of(model, {name: value * float("nan") for name, value in tensors.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exams, "twin_of", spoiled)
        stage.run_stage(config)
    said = capsys.readouterr().out
    assert "the exams failed (UserError: the model computes what is no number in torch.float32" in said
    assert not config.best_path.exists() and config.weight_path.exists()


@pytest.mark.parametrize(
    ("lines", "flags", "expected"),
    [
        (None, {}, ["--eval_tasks ", "asked.jsonl does not exist"]),
        ("no JSON\n", {}, ["--eval_tasks", "asked.jsonl:1: this line is no JSON"]),
        ('{"text": "There is a cat."}\n', {}, ["--eval_tasks", "the last two turns must be a question and its answer"]),
        ("", {}, ["--eval_tasks", "asked.jsonl holds no sample"]),
        (..., {"eval_tasks": "{asked}:0"}, ["--eval_tasks ", "a weight must be a number above 0"]),
        (..., {"eval_tasks": "{asked},{asked}"}, ["--eval_tasks ", "stands there twice"]),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_before_the_first_step(
    lines, flags, expected, asked, data_folder, tower_folder
):
    if lines is None:
        Path(asked).unlink()
    elif lines is not ...:
        Path(asked).write_text(lines)
    tasks = flags.get("eval_tasks", asked).format(asked=asked)
    refusal(tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=tasks), *expected)


def test_questions_that_the_model_cannot_take_are_refused(asked, data_folder, tower_folder):
    texts = str(write_texts(data_folder))
    refusal(tiny(LLM, data_folder, tower_folder, data_path=texts, eval_tasks=asked), "a decoder without eyes")
    turns = [{"role": "user", "content": "why " * 40_000}, {"role": "assistant", "content": "so"}]
    long = str(write_jsonl(data_folder / "long.jsonl", [{"conversations": turns}]))
    refusal(
        tiny(SFT_VLM, data_folder, tower_folder, eval_tasks=long),
        "long.jsonl:1 asks in 80,012 tokens",
        "the model reads 32,768",
    )


# several ranks


@pytest.mark.parametrize("shard", [0, 1])
def test_two_ranks_put_their_parts_together(shard, asked, data_folder, tower_folder):
    settings = {"batch_size": 4, "val_samples": 2, "save_interval": 1, "shard": shard, "dropout": 0.1}
    runs = {}
    for name, tasks in (("with", f"{asked}:2,{data_folder / 'train.jsonl'}"), ("without", "")):
        (data_folder / name).mkdir()
        runs[name] = tiny(
            SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / name / "out"), eval_tasks=tasks, **settings
        )
        assert run_ranks(runs[name], 2) == [0, 0], said_by(runs[name], 0) + said_by(runs[name], 1)
    assert list(exams_in(runs["with"])) == [1, 2]
    assert without_exams(outcome(runs["with"])) == outcome(runs["without"])
    assert {name: mark["count"] for name, mark in status_of(runs["with"])["exams"]["each"].items()} == {
        "asked": 10,
        "train": 24,
    }
    assert said_by(runs["with"], 1).count("exam") == 0


def test_two_ranks_say_what_one_says(asked, talkative, data_folder, tower_folder, monkeypatch):
    """The answers of each rank stand in their places."""
    original = exams.summarize

    def told(questions, answers):
        print(f"answers: {json.dumps(answers['right'])}", flush=True)
        return original(questions, answers)

    monkeypatch.setattr(exams, "summarize", told)
    (data_folder / "ranks").mkdir()
    config = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "ranks/out"), eval_tasks=asked,
                  batch_size=4, **talkative)  # fmt: skip
    assert run_ranks(config, 2) == [0, 0], said_by(config, 0)
    answerer = Answerer.from_weight(config.weight_path, device="cpu", dtype="float32")
    expected = answer_all(answerer, read_questions(Path(asked)), "right", (), 48)
    for rank in range(2):
        (line,) = [line for line in said_by(config, rank).splitlines() if line.startswith("answers: ")]
        assert json.loads(line.removeprefix("answers: ")) == expected
    assert len(set(expected)) > 3


def test_an_exam_that_fails_on_one_rank_fails_on_both_and_training_goes_on(
    asked, data_folder, tower_folder, monkeypatch
):
    def fail_on_rank_1(*arguments, **options):
        if os.environ["RANK"] == "1":
            raise MemoryError("no room")
        return answer_all(*arguments, **options)

    monkeypatch.setattr(exams, "answer_all", fail_on_rank_1)
    (data_folder / "ranks").mkdir()
    config = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "ranks/out"), eval_tasks=asked,
                  batch_size=4)  # fmt: skip
    assert run_ranks(config, 2) == [0, 0]
    assert "the exams failed (on rank 1, MemoryError: no room); training goes on" in said_by(config, 0)
    assert not exams_in(config) and status_of(config)["state"] == "done"
