"""What is said of a harness's results, and of flags that cannot be used; none of it needs the harness."""

import json
import sys
from pathlib import Path

import pytest

from helpers.data import write_jsonl
from model.messages import UserError
from scripts.judge import lmms
from scripts.judge.report import as_text, records, task_report


def sample(said, metric: dict, **row) -> dict:
    return {"doc": {"question": "q", **row}, "target": row.get("answer", ""), "filtered_resps": [said], **metric}


def results_of(task: str, samples: list[dict], **config) -> dict:
    return {
        "configs": {task: {"output_type": "generate_until", "generation_kwargs": {"max_new_tokens": 64}, **config}},
        "samples": {task: samples},
        "versions": {task: 1.0},
        "results": {task: {"alias": task, "exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}},
    }


def test_figures_of_all_and_of_each_kind():
    samples = [
        sample(said, {"exact_match": float(right)}, kind=kind, answer="cat", images=["a picture"])
        for said, right, kind in (("cat", 1, "what"), (" \n", 0, "what"), ("dog", 0, "at"), ("cat", 1, "at"))
    ]
    report = task_report("emoji_world", results_of("emoji_world", samples))
    assert report["n"] == 4 and report["failed_extractions"] == 1
    assert {name: (figure["right"], figure["n"]) for name, figure in report["figures"].items()} == {
        "all": (2, 4), "what": (1, 2), "at": (1, 2),
    }  # fmt: skip
    assert report["figures"]["all"]["interval"] == (0.15, 0.85)
    text = as_text({**report, "prompt": "'<image>q'"})
    assert "greedy, at most 64 new tokens" in text and "4, 1 failed extraction\n" in text
    assert "0.5000  0.15 to 0.85       2 of 4" in text and text.endswith("exact_match 0.5000")
    lines = records("emoji_world", samples)
    assert lines[2] == {"question": "q", "kind": "at", "answer": "cat", "truth": "cat", "said": "dog", "right": False}


@pytest.mark.parametrize(
    ("task", "metric", "said", "failed"),
    [("pope", "pope_accuracy", ["Yes", " no ", "No.", "a dog"], 2),
     ("scienceqa_img", "exact_match", ["B", "b", "B. two", "I say B", ""], 2)],
)  # fmt: skip
def test_answers_that_a_tasks_rule_cannot_read_are_counted(task, metric, said, failed):
    samples = [sample(text, {metric: {"score": 1.0} if task == "pope" else 1.0}) for text in said]
    report = task_report(task, results_of(task, samples))
    assert report["failed_extractions"] == failed and report["figures"]["all"]["right"] == len(said)


def test_a_task_whose_rule_is_not_known_is_told_as_the_harness_tells_it():
    report = task_report("vqav2", results_of("vqav2", [sample("cat", {"vqa": 1.0})]))
    assert "figures" not in report and "counts no failures" in report["extraction"]
    assert as_text(report).endswith("exact_match 0.5000")


def test_a_file_goes_to_our_tasks_and_a_named_one_to_its_task(tmp_path):
    mine, theirs = tmp_path / "mine.jsonl", tmp_path / "mmstar.parquet"
    mine.touch(), theirs.touch()
    tasks = ["emoji_world", "mmstar"]
    assert lmms.data_of_tasks([str(mine), f"mmstar={theirs}"], tasks) == {"emoji_world": mine, "mmstar": theirs}
    assert lmms.data_of_tasks([f"emoji_world={mine}"], tasks) == {"emoji_world": mine}
    kin = ["emoji_world", "emoji_choices", "emoji_choices_letters"]
    assert lmms.data_of_tasks([str(mine), f"emoji_choices={theirs}"], kin) == {
        "emoji_world": mine, "emoji_choices": theirs, "emoji_choices_letters": theirs,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "tasks", "said"),
    [([], ["emoji_world"], "emoji_world needs questions: --data FILE"),
     (["{}/mine.jsonl"], ["mmstar"], "none of --tasks mmstar is left for it; say whose it is: TASK=FILE"),
     (["{}/mime.jsonl"], ["emoji_world"], "did you mean {}/mine.jsonl"),
     (["{}/mine.jsonl", "{}/mine.jsonl"], ["emoji_world"], "none of --tasks emoji_world is left for it"),
     (["emoji_choices={}/mine.jsonl", "emoji_choices_letters={}/mine.jsonl"],
      ["emoji_choices", "emoji_choices_letters"], "--data emoji_choices_letters={}/mine.jsonl: none of --tasks")],
)  # fmt: skip
def test_data_that_no_task_can_take_is_refused(given, tasks, said, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(UserError) as refused:
        lmms.data_of_tasks([value.format(tmp_path) for value in given], tasks)
    assert said.format(tmp_path) in str(refused.value)


def run(monkeypatch, *flags: object) -> str:
    """What the command says as it refuses."""
    monkeypatch.setattr(sys, "argv", ["lmms.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        lmms.main()
    return str(ended.value)


def test_without_the_harness_the_command_says_how_to_install_it(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms.importlib.util, "find_spec", lambda name: None)
    said = run(monkeypatch, "--model", saved, "--tasks", "emoji_world", "--data", "x", "--output", tmp_path)
    assert said.startswith("lmms: lmms-eval is not installed: pip install -r requirements/judges.txt, then pip install")
    for name in ("judges", "lmms"):
        assert Path(lmms.ROOT / f"requirements/{name}.txt").is_file()


def test_questions_without_choices_are_no_exam_of_choices(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms.py", "--model", "m", "--tasks", "emoji_choices", "--output", str(tmp_path)])
    options = lmms.parse()
    line = json.loads((data_folder / "train.jsonl").read_text().splitlines()[0])
    path = write_jsonl(data_folder / "one.jsonl", [line])
    with pytest.raises(UserError, match="without choices"):
        lmms.write_own_tasks({"emoji_choices": path}, options)
