"""A model judged by lmms-eval: on questions of our own, with no network, or on public tasks.

    python scripts/judge/lmms.py --model out/sft_vlm_192.safetensors --tasks emoji_world --data held_out.jsonl
    python scripts/judge/lmms.py --model out/llava --through llava_hf --tasks emoji_world --data held_out.jsonl
    python scripts/judge/lmms.py --model out/sft_vlm_192.safetensors --tasks mmstar,pope,scienceqa_img
    python scripts/judge/lmms.py --model out/sft_vlm_192.safetensors --tasks mmstar --data mmstar=mmstar.parquet

`emoji_world` asks the question of every line and wants the answer letter by letter. Questions with choices, as in
VLMEvalKit's tables, are for `emoji_choices` (the likeliest choice), `emoji_choices_letters` (the likeliest letter) and
`emoji_choices_generated` (the letter that is said). Every other task is lmms-eval's own: from a hub, or from a copy, a
.parquet or a folder of them as the hub has it. Needs requirements/judges.txt and lmms.txt: docs/judges.md.
"""

import argparse
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from dataset.exam.questions import read_questions
from dataset.options import ReadOptions, add_read_flags
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError, did_you_mean
from scripts.judge.report import as_text, records, task_report
from scripts.judge.task_folder import OWN, write_task

VERSIONS = ("lmms_eval", "datasets", "torch", "transformers")
INSTALL = "pip install -r requirements/judges.txt, then pip install --no-deps -r requirements/lmms.txt"


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a file in out/, a folder as transformers saves it")
    parser.add_argument("--tasks", required=True, help="names with commas between them")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE or TASK=FILE",
        help="the questions of our own tasks; TASK=FILE for one of them, or for a public one's copy",
    )
    parser.add_argument("--through", choices=("minimind_vlm", "llava_hf"), default="minimind_vlm",
                        help="who runs the model: our engine, or lmms-eval's own code for stock Llava folders, which "
                        "takes one question at a time")  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "out/judge", help="folder of report and samples")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--vision_model", help="folder of the tower; by default the one trained with")
    add_read_flags(parser)
    options = parser.parse_args()
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch_size and --limit must be at least 1")
    options.tasks = list(dict.fromkeys(filter(None, (name.strip() for name in options.tasks.split(",")))))
    return options


def data_of_tasks(given: list[str], tasks: list[str]) -> dict[str, Path]:
    """Which file each task takes: that named for it or for its kin, else the one that is named for nobody.

    Raises:
        UserError: a task of ours has none, a file is nobody's, or it is not there.
    """
    found: dict[str, Path] = {}
    for value in sorted(given, key=lambda value: value.partition("=")[0] not in tasks):
        name, _, path = value.partition("=")
        if name in tasks:
            takers, path = [task for task in tasks if OWN.get(task, task) == OWN.get(name, name)], Path(path)
        else:
            takers, path = [task for task in tasks if task in OWN and task not in found], Path(value)
        if not takers or takers[0] in found:
            raise UserError(
                f"--data {value}: none of --tasks {','.join(tasks)} is left for it; say whose it is: TASK=FILE"
            )
        if not path.exists():
            raise UserError(f"--data {value}: {path} does not exist{did_you_mean(path)}")
        found |= dict.fromkeys(takers, path)
    if without := [task for task in tasks if task in OWN and task not in found]:
        raise UserError(
            f"--tasks {without[0]} needs questions: --data FILE, such as out/quickstart/data/held_out.jsonl"
        )
    return found


def write_own_tasks(data: dict[str, Path], options: argparse.Namespace) -> list[Path]:
    """A folder for each of our tasks in --tasks, from its file. Raises UserError: the file holds no such questions."""
    folders = []
    for name, path in {OWN[task]: path for task, path in data.items() if task in OWN}.items():
        questions = read_questions(path, ReadOptions.from_flags(options), options.limit)
        if name == "emoji_choices" and not all(question.choices for question in questions):
            raise UserError(f"{path} holds questions without choices, which emoji_choices is about: see docs/judges.md")
        if options.through == "llava_hf" and (blind := [q for q in questions if not q.sample.pictures]):
            raise UserError(
                f"{blind[0].sample.where} has no picture: lmms-eval's llava_hf would answer the one before it once "
                "more; leave such questions out, or --through llava_hf"
            )
        folders.append(write_task(name, questions, options.output / "tasks"))
    return folders


def judge(options: argparse.Namespace) -> dict:
    """The report, which is also written beside every question's answer. Raises UserError."""
    if not importlib.util.find_spec("lmms_eval"):
        raise UserError(f"lmms-eval is not installed: {INSTALL}")
    from scripts.judge import harness  # here, as it imports lmms-eval, which few installs have

    harness.keep_to_errors()
    data = data_of_tasks(options.data, options.tasks)
    options.output.mkdir(parents=True, exist_ok=True)
    own = write_own_tasks(data, options)
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        tasks = harness.Tasks(options.tasks, options.through, own, Path(cache))
        for task, path in data.items():
            if task not in OWN:
                tasks.take_copy(task, path)
        model = harness.load_model(options)
        facts = harness.facts_of(model, options.through)  # now: afterwards lmms-eval has taken llava_hf's model away
        results = harness.evaluate(model, tasks, options.limit)
    report = {
        "harness": {name: version(name) for name in VERSIONS},
        "model": {"path": str(options.model), **facts},
        "tasks": [],
    }
    for task, samples in results["samples"].items():
        shown = {"data": str(data.get(task, "the hub's")), "prompt": harness.first_prompt(model, task, samples)}
        report["tasks"].append(task_report(task, results) | shown)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records(task, samples))
        (options.output / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    (options.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return report


def main() -> None:
    options = parse()
    try:
        report = judge(options)
    except (UserError, OSError) as error:
        raise SystemExit(f"lmms: {error}") from error
    print("harness      " + ", ".join(f"{name} {number}" for name, number in report["harness"].items()))
    print("model        " + ", ".join(f"{name} {value}" for name, value in report["model"].items()))
    for task in report["tasks"]:
        print("\n" + as_text(task))
    print(f"\nreport.json and samples_TASK.jsonl: {options.output}")


if __name__ == "__main__":
    main()
