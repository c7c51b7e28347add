"""VLMEvalKit judges a model on questions that lie here: its code asks, reads answers off, and counts; no network.

    python scripts/judge/vlmevalkit.py --model out/sft_vlm_192.safetensors --data dataset/data/held_out.jsonl
    python scripts/judge/vlmevalkit.py --model out/sft_vlm_192.safetensors --data MMStar.tsv

--data: any format that this project reads, or a .tsv as VLMEvalKit publishes them. Questions with choices are judged by
its rule for those, answers of yes and no by its rule for those, all others by exact match. No other model helps to read
answers (`--judge exact_matching`). Needs the package: pip install --no-deps -r requirements/vlmeval.txt
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.exam.figures import wilson_interval
from dataset.exam.questions import Question, read_questions
from dataset.exam.table import write_table
from dataset.exam.yes_no import is_yes_no
from dataset.options import ReadOptions, add_read_flags
from dataset.readers.tsv_rows import MAX_CELL
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError, counted

MODEL = "minimind"  # its name in files of the harness
LAST_LINES = 8  # of the log, where the harness failed


@dataclass(frozen=True)
class Rule:
    """How VLMEvalKit judges one kind of questions, and where it writes what it found."""

    dataset_class: str
    says: str
    file: str  # behind the names of model and data
    hit: str = "hit"  # its column that says whether an answer is right
    log: str = "log"  # its column that says how an answer was read off
    failed: str = ""  # what stands there where none could be


CHOICES = Rule(
    "CustomMCQDataset",
    "a letter as a word among the last four, else the only choice that the answer contains (its can_infer)",
    "_exact_matching_result", failed="Failed in Prefetch",
)  # fmt: skip
YES_NO = Rule(
    "YesNo",
    "yes or no as a word, without the other (its YOrN_Extraction)",
    "_auxmatch",
    "score",
    "extracted",
    "Unknown",
)
EXACT = Rule("ExactMatch", "exact match of the whole answer", "_exact_result")


def rule_of(questions: Sequence[Question]) -> Rule:
    if all(question.choices for question in questions):
        return CHOICES
    return YES_NO if is_yes_no(questions) else EXACT


def run_harness(options: argparse.Namespace, name: str, rule: Rule) -> None:
    """VLMEvalKit's run.py in a process of its own. Raises UserError where it leaves no answers."""
    folder = options.output.resolve()
    config = {
        "model": {MODEL: {
            "class": "MiniMindVLM", "weight": str(options.model.resolve()), "device": options.device,
            "dtype": options.dtype, "max_new_tokens": options.max_new_tokens, "plain": options.plain,
            "first_prompt": str(folder / "first_prompt.txt"),
        }},
        "data": {name: {"class": rule.dataset_class, "dataset": name}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config, indent=1))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"LMUData": str(folder), "PRED_FORMAT": "tsv", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, ROOT / "scripts/judge/vlmeval_wrapper.py", "--config", folder / "run.json"]
    command += ["--work-dir", folder / "runs", "--judge", "exact_matching"]
    log = folder / "vlmevalkit.log"
    print(f"VLMEvalKit asks; its log: {log}", flush=True)
    with log.open("w") as file:
        done = subprocess.run(
            list(map(str, command)), env=os.environ | environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode or not results_file(options, name, rule).is_file():
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise UserError(f"VLMEvalKit found nothing (exit status {done.returncode}); its log ends with\n{last}")


def results_file(options: argparse.Namespace, name: str, rule: Rule) -> Path:
    return options.output.resolve() / "runs" / MODEL / f"{MODEL}_{name}{rule.file}.tsv"


def judged(options: argparse.Namespace, name: str, rule: Rule) -> list[dict]:
    """One record a question that the harness asked, in the order of the data."""
    csv.field_size_limit(MAX_CELL)
    with results_file(options, name, rule).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    records = [
        {
            "index": int(row["index"]), "question": row["question"], "truth": row["answer"], "said": row["prediction"],
            "right": row[rule.hit] in ("1", "1.0", "True"),
            "failed": bool(rule.failed) and rule.failed in row[rule.log], "category": row.get("category", "all"),
        }
        for row in rows
    ]  # fmt: skip
    return sorted(records, key=lambda record: record["index"])


def figures(records: Sequence[dict]) -> dict:
    right = sum(record["right"] for record in records)
    return {
        "right": right, "count": len(records), "accuracy": round(right / len(records), 4),
        "interval": wilson_interval(right, len(records)), "failed": sum(record["failed"] for record in records),
    }  # fmt: skip


def report_of(options: argparse.Namespace, rule: Rule, records: Sequence[dict], asked: int) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("ms-vlmeval", "torch", "transformers")}
    categories = dict.fromkeys(record["category"] for record in records)
    return {
        "harness": "VLMEvalKit",
        "versions": versions,
        "model": str(options.model),
        "data": str(options.data),
        "first_prompt": (options.output / "first_prompt.txt").read_text(encoding="utf-8"),
        "decoding": f"temperature 0, at most {options.max_new_tokens} tokens, one question at a time",
        "rule": rule.says,
        "without_pictures": asked - len(records),
        "all": figures(records),
        "by_category": {
            name: figures([record for record in records if record["category"] == name]) for name in categories
        },
    }


def table(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"harness             VLMEvalKit ({versions})", f"first prompt        {report['first_prompt']!r}"]
    lines += [f"decoding            {report['decoding']}", f"rule                {report['rule']}"]
    lines.append(f"failed extractions  {report['all']['failed']:,} of {report['all']['count']:,}")
    if report["without_pictures"]:
        lines.append(f"left out by it      {counted(report['without_pictures'], 'questions')} without a picture")
    for name, found in [("all", report["all"]), *report["by_category"].items()]:
        interval = "{:.2f} to {:.2f}".format(*found["interval"])
        lines.append(f"{name:<20}{found['accuracy']:.3f}  {interval}  {found['right']:,} of {found['count']:,}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a file in out/, or a folder with config.json")
    parser.add_argument("--data", type=Path, required=True, help="questions, a file or a folder of any format")
    add_read_flags(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "out/judge/vlmevalkit", help="folder for all it writes")
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--plain", action="store_true", help="ask questions with choices without naming the choices")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    options = parser.parse_args()
    if options.max_new_tokens < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--max_new_tokens and --limit must be at least 1")
    return options


def main() -> None:
    options = parse()
    try:
        if not importlib.util.find_spec("vlmeval"):
            raise UserError("VLMEvalKit is not installed: pip install --no-deps -r requirements/vlmeval.txt")
        if not options.model.exists():
            raise UserError(f"--model {options.model} does not exist")
        questions = read_questions(options.data, ReadOptions.from_flags(options), options.limit)
        rule, name = rule_of(questions), options.data.stem
        options.output.mkdir(parents=True, exist_ok=True)
        write_table(questions, options.output / f"{name}.tsv")
        run_harness(options, name, rule)
        records = judged(options, name, rule)
        report = report_of(options, rule, records, len(questions))
    except (UserError, OSError) as error:
        raise SystemExit(f"vlmevalkit: {error}") from error
    print(table(report))
    (options.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (options.output / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
