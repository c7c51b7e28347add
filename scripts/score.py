"""Exact match on a held-out file, by kind of question and language, with the right, a wrong and no picture.

    python scripts/score.py --weight out/sft_vlm_192.safetensors --data dataset/data/held_out.jsonl --json score.json

The last answer of each line is asked for. `shuffled` shows another line's picture: what is still right there was not
seen but guessed, and `none` says how far the questions alone carry. Intervals are Wilson's at 95 %. Questions without
pictures, or with more of them than any other line shows, are left out of `shuffled`, and counted.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.options import ReadOptions, add_read_flags
from dataset.readers.opening import left_out, open_data
from dataset.samples import BadSample, DataError, Sample
from model.command_line import CommandLine
from model.inference.answerer import Answerer, Options, add_weight_flags
from model.inference.reader import Prompt
from model.messages import UserError
from model.processing import IMAGE_TAG
from model.progress import progress_over
from scripts.assets.sheet import draw_sheet

MODES = ("right", "shuffled", "none")
BRIEF = Options(max_new_tokens=64)  # answers of this kind of data are short


@dataclass(frozen=True)
class Question:
    sample: Sample
    truth: str
    kind: str
    language: str

    @property
    def text(self) -> str:
        return self.sample.messages[-2]["content"].replace(IMAGE_TAG, "").strip()


def read_questions(path: Path, options: ReadOptions | None = None, limit: int | None = None) -> list[Question]:
    """One question a line; `kind` and `language` are the line's own fields where it has them.

    Lines that cannot be read, or whose pictures cannot, are left out, and a line on stderr says so.
    """
    samples, questions, bad = open_data(path, options), [], []
    readable: set[Path] = set()  # many questions are about one picture
    count = min(len(samples), limit or len(samples))
    for index in range(count):
        try:
            sample = samples[index]
            for place, picture in enumerate(sample.pictures):
                if picture not in readable:
                    sample.open_picture(place)
                    if isinstance(picture, Path):
                        readable.add(picture)
        except BadSample as error:
            bad.append(error)
            continue
        roles = [message.get("role") for message in sample.messages[-2:]]
        if roles != ["user", "assistant"]:
            raise DataError(f"{sample.where}: the last two turns must be a question and its answer, they are {roles}")
        facts = {name: str(sample.extra.get(name, "all")) for name in ("kind", "language")}
        questions.append(Question(sample, sample.messages[-1]["content"].strip(), **facts))
    if bad:
        print(left_out(bad, count, "lines"), file=sys.stderr)
    return questions


def prompt_of(answerer: Answerer, question: Question, mode: str, shown: Question) -> Prompt:
    """The question as the model gets it: with the pictures of `shown`, or with none."""
    messages = question.sample.messages[:-1]
    if mode != "none":
        return answerer.prompt(messages, shown.sample.open_pictures())
    return answerer.prompt([{**m, "content": m["content"].replace(IMAGE_TAG, "").strip()} for m in messages])


def wrong_pictures(questions: Sequence[Question]) -> list[Question | None]:
    """For each question one with as many pictures, but other ones; None where it has none, or nobody else does.

    The different pictures (or sets of them) of one number stand in the file's order; each gets those half of them away.
    """
    groups: dict[int, dict[tuple, Question]] = defaultdict(dict)  # by number of pictures: who shows which ones first
    for question in questions:
        groups[len(question.sample.pictures)].setdefault(question.sample.pictures, question)
    other: dict[tuple, Question | None] = {}
    for first in (list(group.values()) for group in groups.values()):
        rotated = first[len(first) // 2 :] + first[: len(first) // 2]
        for question, wrong in zip(first, rotated, strict=True):
            other[question.sample.pictures] = wrong if wrong is not question else None
    return [other[question.sample.pictures] for question in questions]


def answer_all(
    answerer: Answerer, questions: Sequence[Question], mode: str, wrong: Sequence[Question | None], batch_size: int
) -> list[str | None]:
    """The answer to each question; None where `wrong`, of wrong_pictures, has nothing to shuffle with."""
    shown = wrong if mode == "shuffled" else questions
    places: dict[tuple, int] = {}  # questions about one picture together: the engine then reads it once
    asked = [number for number, question in enumerate(shown) if question]
    asked.sort(key=lambda number: places.setdefault(shown[number].sample.pictures, len(places)))
    answers: list[str | None] = [None] * len(questions)
    for start in progress_over(range(0, len(asked), batch_size), mode, "batch"):
        numbers = asked[start : start + batch_size]
        prompts = [prompt_of(answerer, questions[number], mode, shown[number]) for number in numbers]
        for number, answer in zip(numbers, answerer.batch(prompts, BRIEF), strict=True):
            answers[number] = answer.text.strip()
    return answers


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, proportion = 1.959964, right / count
    middle = (proportion + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(proportion * (1 - proportion) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(max(0.0, middle - half), 4), round(middle + half, 4)


def summarize(questions: Sequence[Question], answers: dict[str, list[str | None]]) -> dict:
    """Exact match: overall (kinds weigh alike), by kind, by language, each with interval and count.

    It is None where nothing was asked, as of the shuffled pictures of questions without pictures.
    """

    def figures(numbers: Iterable[int]) -> dict:
        result = {}
        for mode, texts in answers.items():
            right = [texts[n] == questions[n].truth for n in numbers if texts[n] is not None]
            result[mode] = {
                "exact_match": round(sum(right) / len(right), 4) if right else None,
                "interval": wilson_interval(sum(right), len(right)),
                "count": len(right),
            }
        return result

    def figures_by(field: str) -> dict[str, dict]:
        groups: dict[str, list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            groups[getattr(question, field)].append(number)
        return {name: figures(numbers) for name, numbers in groups.items()}

    def mean(matches: list[float | None]) -> float | None:
        known = [match for match in matches if match is not None]
        return round(sum(known) / len(known), 4) if known else None

    by_kind = figures_by("kind")
    unshuffled = [q.sample.pictures for q, text in zip(questions, answers["shuffled"], strict=True) if text is None]
    return {
        "exact_match": {mode: mean([kind[mode]["exact_match"] for kind in by_kind.values()]) for mode in answers},
        "not_shuffled": {
            "without_pictures": sum(not pictures for pictures in unshuffled),
            "without_another": sum(bool(pictures) for pictures in unshuffled),
        },
        "all": figures(range(len(questions))),
        "by_kind": by_kind,
        "by_language": figures_by("language"),
    }


def table(report: dict) -> str:
    rows = list(report["by_kind"].items())
    if len(rows) > 1:  # where there is one kind, its row says the same
        overall = {mode: {"exact_match": match} for mode, match in report["exact_match"].items()}
        rows.insert(0, ("all, kinds alike", overall))
    if len(rows) > 1 or len(report["by_language"]) > 1:
        rows += report["by_language"].items()
    heads = {"right": "right picture", "shuffled": "shuffled picture", "none": "no picture"}
    lines = [f"{'':<18}" + "".join(f"{heads[mode]:>26}" for mode in report["exact_match"])]
    lines += [f"{name:<18}" + "".join(map(_cell, figures.values())) for name, figures in rows]
    without = report["not_shuffled"]
    if count := sum(without.values()):
        lines.append(
            f"left out of the shuffled figure: {count:,} of {report['all']['right']['count']:,} questions, "
            f"{without['without_pictures']:,} without pictures and {without['without_another']:,} with no other "
            "pictures of that number in the file"
        )
    return "\n".join(lines)


def _cell(figure: dict) -> str:
    if figure["exact_match"] is None:
        return f"{'-':>10}{'':<16}"
    interval = "{:.2f} to {:.2f}".format(*figure["interval"]) if "interval" in figure else ""
    return f"{figure['exact_match']:>10.3f}  {interval:<14}"


def score(answerer: Answerer, questions: Sequence[Question], batch_size: int = 48) -> tuple[dict, list[dict]]:
    """The report, and one record a question with every mode's answer."""
    wrong = wrong_pictures(questions)
    answers = {mode: answer_all(answerer, questions, mode, wrong, batch_size) for mode in MODES}
    records = [
        {
            "where": question.sample.where,
            "pictures": [str(picture) for picture in question.sample.pictures if isinstance(picture, Path)],
            "kind": question.kind,
            "language": question.language,
            "question": question.text,
            "truth": question.truth,
            **{mode: texts[number] for mode, texts in answers.items()},
        }
        for number, question in enumerate(questions)
    ]
    return summarize(questions, answers), records


def main() -> None:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    parser.add_argument("--data", type=Path, required=True, help="held-out questions, a file or a folder of any format")
    add_read_flags(parser)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--answers", type=Path, help="write every question with its answers here, as JSON lines")
    parser.add_argument("--sheet", type=Path, help="draw the first pictures with questions and answers here, a .png")
    options = parser.parse_args()
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch_size and --limit must be at least 1")
    try:
        for path in filter(None, (options.json, options.answers, options.sheet)):
            if not path.parent.is_dir():
                raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
        questions = read_questions(options.data, ReadOptions.from_flags(options), options.limit)
        report, records = score(Answerer.from_flags(options), questions, options.batch_size)
    except (UserError, OSError) as error:
        raise SystemExit(f"score: {error}") from error
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.answers:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        options.answers.write_text("".join(lines), encoding="utf-8")
    if options.sheet:
        pictures = [{"pictures": question.sample.pictures} for question in questions]  # also those that are no files
        draw_sheet([record | shown for record, shown in zip(records, pictures, strict=True)], options.sheet)
        print(f"sheet: {options.sheet}")


if __name__ == "__main__":
    main()
