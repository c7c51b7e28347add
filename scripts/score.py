"""Exact match on a held-out file, by kind of question and language, with the right, a wrong and no picture.

    python scripts/score.py --weight out/sft_vlm_192.safetensors --data dataset/data/held_out.jsonl --json score.json

The last answer of each line is asked for. `shuffled` shows another line's picture: what is still right there was not
seen but guessed, and `none` says how far the questions alone carry. Intervals are Wilson's at 95 %. Questions without
pictures, or with more of them than any other line shows, are left out of `shuffled`, and counted. Of questions about
videos `shuffled` shows the right video with its frames in another order: what is still right needed no order.

--exam asks the harder exam of Emoji World instead, family by family: dataset/exam/emoji_exam.py says what these are.
Questions with choices (VLMEvalKit's tables, MMStar and the like) are scored by likelihood and by generation, questions
that are answered yes or no as POPE is: docs/choices.md; such as are answered with boxes
by how well these fit: docs/grounding.md. --html writes what is wrong on one page: docs/evaluation.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from dataset import emoji_world
from dataset.exam import box_scores, choices, clips, families, yes_no
from dataset.exam.answering import score
from dataset.exam.emoji_exam import write_exam
from dataset.exam.figures import cell
from dataset.exam.mistakes import worst_mistakes
from dataset.exam.questions import Question, read_questions
from dataset.options import ReadOptions, add_read_flags
from model.command_line import CommandLine
from model.files import ROOT
from model.inference.answerer import Answerer, add_weight_flags
from model.messages import UserError, counted
from scripts.assets.errors_page import WORST, Findings, write_page
from scripts.assets.sheet import draw_sheet
from scripts.demo.weights import weights_or_newest

EXAM_SCENES = 100  # of each family


HEADS = {"right": "right picture", "shuffled": "shuffled picture", "none": "no picture"}


def table(report: dict, heads: Mapping[str, str] = HEADS) -> str:
    rows = list(report["by_kind"].items())
    if len(rows) > 1:  # where there is one kind, its row says the same
        overall = {mode: {"exact_match": match} for mode, match in report["exact_match"].items()}
        rows.insert(0, ("all, kinds alike", overall))
    if len(rows) > 1 or len(report["by_language"]) > 1:
        rows += report["by_language"].items()
    lines = [f"{'':<18}" + "".join(f"{heads[mode]:>26}" for mode in report["exact_match"])]
    lines += [f"{name:<18}" + "".join(map(cell, figures.values())) for name, figures in rows]
    without = report["not_shuffled"]
    if count := sum(without.values()):
        lines.append(
            f"left out of the shuffled figure: {count:,} of {report['all']['right']['count']:,} questions, "
            f"{without['without_pictures']:,} without pictures and {without['without_another']:,} with no other "
            "pictures of that number in the file"
        )
    return "\n".join(lines)


def examine(answerer: Answerer, questions: list[Question], base: Answerer | None, batch_size: int) -> tuple:
    """The report, one record a question, and the table that is printed: as the kind of the questions asks for it."""
    with_choices = sum(bool(question.choices) for question in questions)
    if 0 < with_choices < len(questions):
        raise UserError(
            f"{with_choices:,} of {len(questions):,} questions have choices: score them as a file of their own"
        )
    if base and not with_choices:
        raise UserError("--base is for the leakage of questions with choices, and these have none: leave it out")
    if with_choices:
        report, records = choices.score_choices(answerer, questions, base, max(1, batch_size // 3))
        return report, records, choices.table(report)
    if clips.about_videos(questions):
        report, records = score(answerer, questions, batch_size, clips.out_of_order(questions))
        return report, records, table(report, clips.SHOWN)
    if box_scores.holds_boxes(questions):
        report, records = box_scores.score_boxes(answerer, questions, batch_size)
        return report, records, box_scores.table(report)
    if yes_no.is_yes_no(questions):
        report, records = yes_no.score_yes_no(answerer, questions, batch_size)
        return report, records, yes_no.table(report)
    if families.in_families(questions):
        report, records = families.score_families(answerer, questions, batch_size)
        return report, records, families.table(report)
    report, records = score(answerer, questions, batch_size)
    return report, records, table(report)


def made_exam(folder: Path) -> Path:
    """The file of the exam's questions; they are the same wherever they are made."""
    path = folder / "exam.jsonl"
    if not path.is_file():
        print(f"{path}: {counted(write_exam(folder, EXAM_SCENES), 'questions')}")
    return path


def main() -> None:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", type=Path, help="held-out questions, a file or a folder of any format")
    asked.add_argument(
        "--exam", type=Path, nargs="?", const=ROOT / "out/exam",
        help="Emoji World's harder exam, in this folder, which is made where it is missing",
    )  # fmt: skip
    add_read_flags(parser)
    parser.add_argument(
        "--base", type=Path, help="weights of the base decoder: with them the leakage of choices is told"
    )
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--answers", type=Path, help="write every question with its answers here, as JSON lines")
    parser.add_argument("--sheet", type=Path, help="draw pictures with questions and answers here, a .png")
    parser.add_argument("--html", type=Path, help="write here what is wrong, and where the model looked: one page")
    parser.add_argument("--credit", default="", help="whose pictures these are, for the sheet and the page")
    options = parser.parse_args()
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch_size and --limit must be at least 1")
    try:
        for path in filter(None, (options.json, options.answers, options.sheet, options.html)):
            if not path.parent.is_dir():
                raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
        if options.exam:
            options.data = made_exam(options.exam)
            options.credit = options.credit or emoji_world.attribution()
        questions = read_questions(options.data, ReadOptions.from_flags(options), options.limit)
        options.weight = weights_or_newest(options.weight)
        answerer = Answerer.from_flags(options)
        base = options.base and Answerer.from_weight(options.base, device=options.device, dtype=options.dtype)
        report, records, shown = examine(answerer, questions, base, options.batch_size)
    except (UserError, OSError) as error:
        raise SystemExit(f"score: {error}") from error
    print(shown)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.answers:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        options.answers.write_text("".join(lines), encoding="utf-8")
    if options.sheet:
        pictures = [{"pictures": question.sample.pictures} for question in questions]  # also those that are no files
        records_to_draw = [record | found for record, found in zip(records, pictures, strict=True)]
        draw_sheet(records_to_draw, options.sheet, options.credit)
        print(f"sheet: {options.sheet}")
    if options.html:
        worst, mistakes = worst_mistakes(answerer, questions, records, WORST)
        names = ("/".join(path.parts[-2:]) for path in (options.weight, options.data))  # no reader's machine has more
        findings = Findings(*names, report, shown, records, worst, mistakes, options.credit)
        write_page(findings, options.html)
        print(f"page: {options.html}")


if __name__ == "__main__":
    main()
