"""lmms-eval itself on tiny models: what it asks, finds and counts is what this project's own score does."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is tried by make test-judges")

import pyarrow
from lmms_eval.models.registry_v2 import ModelRegistryV2
from pyarrow import parquet

from dataset.exam.answering import score
from dataset.exam.choices import score_choices
from dataset.exam.emoji_choices import emoji_choices
from dataset.exam.questions import read_questions
from dataset.exam.table import write_table
from helpers.data import encoded, make_picture, write_jsonl
from helpers.models import enliven_all
from helpers.repository import ROOT
from model.inference.answerer import Answerer
from model.inference.likelihood import log_likelihoods
from model.weights import save_weights
from scripts.judge import lmms
from scripts.judge.task_folder import write_task

PROMPTS = {"en": ("What is it?", "Where is it?"), "zh": ("图中有什么？", "在哪里？")}


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """In place of the suite's: what lmms-eval's own code is warned of is not ours to mend."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever asks for an address outside of this machine fails at once, and the test with it."""

    def refuse(*_arguments: object, **_named: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def weight(make_vlm, tmp_path) -> Path:
    path = tmp_path / "out" / "sft_vlm_32.safetensors"
    save_weights(enliven_all(make_vlm()), path, {"stage": "sft_vlm"})
    return path


@pytest.fixture
def held_out(weight, tmp_path) -> Path:
    """24 questions about a picture before the words, or behind, about two or none. Every other truth is what the model
    says."""
    (tmp_path / "images").mkdir()
    records, path = [], tmp_path / "held_out.jsonl"
    for number in range(24):
        names = [f"{number // 4}_{k}.png" for k in range((1, 1, 2, 0)[number % 4])]
        for k, name in enumerate(names):
            make_picture(10 * number + k).save(tmp_path / "images" / name)
        language = ("en", "zh")[number % 2]
        tags, asked = "<image>" * len(names), PROMPTS[language][number // 2 % 2]
        question = f"{asked}\n{tags}" if number % 4 == 1 else f"{tags}\n{asked}" if names else asked
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
        records.append({"image": names, "conversations": turns, "kind": "abc"[number % 3], "language": language})
    _, answers = score(
        Answerer.from_weight(weight, device="cpu", dtype="float32"), read_questions(write_jsonl(path, records))
    )
    for record, answer in zip(records[::2], answers[::2], strict=True):
        record["conversations"][1]["content"] = answer["right"] or "a cat"
    return write_jsonl(path, records)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """judge(weight, "emoji_world", ...): the report and the samples that the command wrote."""

    def run(model: Path, tasks: str, *flags: object) -> tuple[dict, dict[str, list[dict]]]:
        output = tmp_path / "judge"
        fixed = ("--model", model, "--tasks", tasks, "--output", output, "--device", "cpu", "--dtype", "float32")
        monkeypatch.setattr(sys, "argv", ["lmms.py", *map(str, (*fixed, *flags))])
        lmms.main()
        report = json.loads((output / "report.json").read_text())
        names = [task["task"] for task in report["tasks"]]
        return report, {
            name: [json.loads(line) for line in (output / f"samples_{name}.jsonl").open()] for name in names
        }

    return run


def test_our_engine_answers_as_for_score_question_by_question(weight, held_out, judge, capsys):
    summary, answers = score(Answerer.from_weight(weight, device="cpu", dtype="float32"), read_questions(held_out))
    report, samples = judge(weight, "emoji_world", "--data", held_out, "--batch_size", 5)
    assert [line["said"].strip() for line in samples["emoji_world"]] == [answer["right"] for answer in answers]
    (task,) = report["tasks"]
    assert {name: figure["rate"] for name, figure in task["figures"].items()} == {
        "all": summary["all"]["right"]["exact_match"],
        **{kind: figures["right"]["exact_match"] for kind, figures in summary["by_kind"].items()},
    }
    assert task["harness"]["exact_match"] == pytest.approx(summary["all"]["right"]["exact_match"], abs=1e-4)
    assert task["harness"]["kinds_alike"] == pytest.approx(summary["exact_match"]["right"], abs=1e-4)
    assert task["prompt"].count("<image>") == 1 and "What is it?" in task["prompt"]
    shown = capsys.readouterr().out
    for said in (
        "lmms_eval 0.7.3",
        "through minimind_vlm",
        "greedy, at most 64 new tokens",
        "24, ",
        "failed extraction",
    ):
        assert said in shown


def test_lmms_evals_own_code_gives_the_same_answers_from_the_exported_folder(weight, held_out, judge, tmp_path):
    pytest.importorskip("decord", reason="lmms-eval's llava_hf wants it: make test-judges")
    folder = tmp_path / "llava"
    flags = ["--weight", str(weight), "--to", "llava", "--output", str(folder)]
    subprocess.run([sys.executable, "scripts/convert_vlm.py", *flags], cwd=ROOT, check=True)
    with pytest.raises(
        SystemExit, match="held_out.jsonl:4 has no picture: lmms-eval's llava_hf would answer the one before"
    ):
        judge(folder, "emoji_world", "--data", held_out, "--through", "llava_hf")
    lines = [line for line in held_out.read_text().splitlines() if json.loads(line)["image"]]
    held_out.write_text("\n".join(lines) + "\n")
    _, ours = judge(weight, "emoji_world", "--data", held_out)
    report, theirs = judge(folder, "emoji_world", "--data", held_out, "--through", "llava_hf")
    assert report["model"]["batch_size"] == "1" and len(theirs["emoji_world"]) == 18
    for mine, other in zip(ours["emoji_world"], theirs["emoji_world"], strict=True):
        assert mine["said"].strip() == other["said"].strip(), mine


@pytest.fixture
def choices(tmp_path) -> Path:
    """Twelve questions with four choices about Emoji World, as VLMEvalKit's table."""
    path = tmp_path / "choices.tsv"
    write_table(emoji_choices(12, vocabulary=64), path)
    return path


def test_choices_by_likelihood_and_by_what_is_said(weight, choices, judge):
    """lmms-eval takes the choice and the letter that score.py takes; letters that are said are read by its own rule."""
    answerer, questions = Answerer.from_weight(weight, device="cpu", dtype="float32"), read_questions(choices)
    _, ours = score_choices(answerer, questions)
    report, samples = judge(weight, "emoji_choices,emoji_choices_letters,emoji_choices_generated", "--data", choices)
    picked = [line["picked"]["right"] for line in ours]
    right = [one["letters"]["texts"] == question.truth for one, question in zip(picked, questions, strict=True)]
    assert [line["right"] for line in samples["emoji_choices"]] == right and set(right) == {True, False}
    assert [line["said"].strip() for line in samples["emoji_choices_generated"]] == [
        one["said"]["generation"] for one in picked
    ]
    ended = []  # score.py scores a letter alone, this harness with the end of the answer
    for question in questions:
        prompt = answerer.prompt(question.sample.messages[:1], question.sample.open_pictures())
        found = log_likelihoods(answerer, [prompt] * 4, list("ABCD"), with_end=True)
        ended.append(max(range(4), key=lambda n: found[n].total) == "ABCD".index(question.truth))
    assert [line["right"] for line in samples["emoji_choices_letters"]] == ended
    by_text, by_letter, by_saying = report["tasks"]
    assert by_text["figures"]["all"]["right"] == sum(right) and len(by_text["figures"]) > 2
    assert by_text["failed_extractions"] == by_letter["failed_extractions"] == 0 < by_saying["failed_extractions"]
    assert by_text["decoding"].startswith("none: log p") and "Options:" not in by_text["prompt"]
    assert "Options:" in by_letter["prompt"] and "Options:" in by_saying["prompt"]


def copies(folder: Path, says_which_are_pictures: bool) -> dict[str, Path]:
    """Four rows of each public task, in the columns that its hub has."""
    picture = {"bytes": encoded(make_picture(1)), "path": None}
    rows = {
        "mmstar": [{"index": n, "question": f"What is it? Options: A: cat, B: dog, C: {n}, D: e", "image": picture,
                    "answer": "ABCD"[n], "category": ("math", "logical reasoning")[n % 2], "l2_category": "geometry",
                    "meta_info": "{}"} for n in range(4)],
        "pope": [{"id": str(n), "question_id": str(n), "question": "Is there a cat?", "answer": ("yes", "no")[n % 2],
                  "image_source": "x", "image": picture, "category": "popular"} for n in range(4)],
        "scienceqa_img": [{"image": picture, "question": "What is it?", "choices": ["cat", "dog"], "answer": n % 2,
                           "hint": "", "task": "x", "grade": "1", "subject": "x", "topic": "x", "category": "x",
                           "skill": "x", "lecture": "", "solution": ""} for n in range(4)],
    }  # fmt: skip
    paths = {}
    for name, lines in rows.items():
        table = pyarrow.Table.from_pylist(lines)
        if says_which_are_pictures:
            import datasets  # whose columns say what they hold

            table = datasets.Dataset.from_list(lines).cast_column("image", datasets.Image()).data.table
        paths[name] = folder / f"{name}.parquet"
        parquet.write_table(table, paths[name])
    return paths


@pytest.mark.parametrize("says_which_are_pictures", [False, True])
def test_public_tasks_take_a_copy_with_no_network(weight, judge, tmp_path, says_which_are_pictures):
    paths = copies(tmp_path, says_which_are_pictures)
    given = [f"{name}={path}" for name, path in paths.items()]
    report, samples = judge(weight, ",".join(paths), "--data", *given)
    assert [task["task"] for task in report["tasks"]] == list(paths)
    for task in report["tasks"]:
        assert task["n"] == 4 == len(samples[task["task"]]) and task["figures"]["all"]["n"] == 4
        assert task["prompt"].count("<image>") == 1
    mmstar, pope, _ = report["tasks"]
    assert set(mmstar["figures"]) == {"all", "math", "logical reasoning"} and "average" in mmstar["harness"]
    assert "Answer the question using a single word or phrase." in pope["prompt"] and "pope_f1_score" in pope["harness"]


def test_a_copy_may_be_a_folder_of_several_files_of_which_those_of_the_split_count(weight, judge, tmp_path):
    folder = tmp_path / "POPE"
    folder.mkdir()
    stored = copies(tmp_path, True)["pope"].read_bytes()
    for name in ("test-00000-of-00002", "test-00001-of-00002", "train-00000-of-00001"):
        (folder / f"{name}.parquet").write_bytes(stored)
    report, _ = judge(weight, "pope", "--data", f"pope={folder}")
    assert report["tasks"][0]["n"] == 8 and report["tasks"][0]["data"] == str(folder)


@pytest.mark.parametrize(
    ("tasks", "flags", "said"),
    [("emoji_wrld", [], "has such a task: did you mean emoji_world?"),
     ("pope_full", ["--data", "pope_full={}"], "pope_full is a group of tasks: name one of them"),
     ("mmstar", ["--data", "mmstar={}"], "a copy is a .parquet or a folder of them, as the hub has it"),
     ("emoji_world", ["--data", "{}", "--through", "llava_hf"], "llava_hf reads folders"),
     ("emoji_choices", ["--data", "{}", "--through", "llava_hf"], "lmms-eval makes text of the likelihoods")],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_in_a_sentence(tasks, flags, said, weight, choices, judge):
    with pytest.raises(SystemExit) as refused:
        judge(weight, tasks, *(flag.format(choices) for flag in flags))
    assert said in str(refused.value) and str(refused.value).startswith("lmms: ")


def test_lmms_evals_own_command_finds_our_engine_and_our_tasks(weight, held_out, tmp_path):
    """By the entry point, which is read here as `pip install -e .` has it installed."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    installed = tmp_path / "installed" / "minimind_judged-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: minimind_judged\nVersion: 0\n")
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (installed / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(lines))
    write_task("emoji_world", read_questions(held_out), tmp_path / "tasks")
    command = [sys.executable, "-m", "lmms_eval", "--model", "minimind_vlm", "--tasks", "emoji_world", "--limit", "24",
               "--model_args", f"pretrained={weight},dtype=float32", "--device", "cpu", "--include_path",
               str(tmp_path / "tasks"), "--output_path", str(tmp_path / "logs"), "--log_samples"]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(installed.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|emoji_world" in done.stdout
    (results,) = (tmp_path / "logs").rglob("*_results.json")
    found = json.loads(results.read_text())["results"]["emoji_world"]["exact_match,none"]
    truths = score(Answerer.from_weight(weight, device="cpu", dtype="float32"), read_questions(held_out))[0]
    assert found == pytest.approx(truths["all"]["right"]["exact_match"], abs=1e-4)


def test_the_entry_point_resolves():
    registry = ModelRegistryV2()
    from scripts.judge.lmms_model import MANIFEST, MiniMindVLM

    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("minimind_vlm") is MiniMindVLM
