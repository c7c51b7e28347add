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

from dataset.formats import BadSample, DataError, Sample
from dataset.limits import PictureLimits, add_limits, limits_of
from model.command_line import CommandLine
from model.inference.answerer import Answerer, Conversation, Options
from model.messages import UserError
from model.processing import IMAGE_TAG
from model.progress import progress_over
from scripts.assets.sheet import draw_sheet
from scripts.given_data import left_out, open_data

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


def read_questions(
    path: Path, images_path: Path | None = None, limit: int | None = None, limits: PictureLimits | None = None
) -> list[Question]:
    """One question a line; `kind` and `language` are the line's own fields where it has them.

    Lines that cannot be read, or whose pictures cannot, are left out and told.
    """
    samples, questions, bad = open_data(path, images_path, limits), [], []
    sound: set[Path] = set()  # many questions are about one picture
    count = min(len(samples), limit or len(samples))
    for index in range(count):
        try:
            sample = samples[index]
            for place, picture in enumerate(sample.pictures):
                if picture not in sound:
                    sample.open_picture(place)
                    sound.update((picture,) if isinstance(picture, Path) else ())
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


def conversation(question: Question, mode: str, shown: Question) -> Conversation:
    """The question as the model gets it: with the pictures of `shown`, or with none."""
    messages = question.sample.messages[:-1]
    if mode == "none":
        return [{**m, "content": m["content"].replace(IMAGE_TAG, "").strip()} for m in messages], []
    return messages, shown.sample.open_pictures()


def wrong_pictures(questions: Sequence[Question]) -> list[Question | None]:
    """For each question one with as many pictures, but other ones; None where it has none, or nobody else does.

    Of the different pictures (or sets of them) of one number, in the file's order, it gets those half of them away.
    """
    shows: dict[int, dict[tuple, Question]] = defaultdict(dict)  # by number of pictures: pictures, who shows them first
    for question in questions:
        shows[len(question.sample.pictures)].setdefault(question.sample.pictures, question)
    other: dict[tuple, Question | None] = {(): None}
    for first in (list(group.values()) for number, group in shows.items() if number):
        turned = first[len(first) // 2 :] + first[: len(first) // 2]
        for question, wrong in zip(first, turned, strict=True):
            other[question.sample.pictures] = wrong if wrong is not question else None
    return [other[question.sample.pictures] for question in questions]


def answer_all(
    answerer: Answerer, questions: Sequence[Question], mode: str, wrong: Sequence[Question | None], batch_size: int
) -> list[str | None]:
    """None where there is nothing to shuffle with: wrong, of wrong_pictures, then has none."""
    asked = [number for number in range(len(questions)) if mode != "shuffled" or wrong[number]]
    shown = wrong if mode == "shuffled" else questions
    places: dict[tuple, int] = {}  # questions about one picture together: the engine then reads it once
    order = sorted(asked, key=lambda number: places.setdefault(shown[number].sample.pictures, len(places)))
    answers: list[str | None] = [None] * len(questions)
    for start in progress_over(range(0, len(order), batch_size), mode, "batch"):
        numbers = order[start : start + batch_size]
        found = answerer.batch([conversation(questions[n], mode, shown[n]) for n in numbers], BRIEF)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer.text.strip()
    return answers


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(middle - half, 4), round(middle + half, 4)


def summarize(questions: Sequence[Question], answers: dict[str, list[str | None]]) -> dict:
    """Shares of exact answers: overall (kinds weigh alike), by kind, by language, each with interval and count.

    A share is None where nothing was asked, as of the shuffled pictures of questions without pictures.
    """

    def figures(numbers: Sequence[int]) -> dict:
        result = {}
        for mode, texts in answers.items():
            asked = [number for number in numbers if texts[number] is not None]
            right = sum(texts[number] == questions[number].truth for number in asked)
            result[mode] = {
                "exact_match": round(right / len(asked), 4) if asked else None,
                "interval": wilson_interval(right, len(asked)),
                "count": len(asked),
            }
        return result

    groups: dict[str, dict[str, list[int]]] = {"kind": defaultdict(list), "language": defaultdict(list)}
    for number, question in enumerate(questions):
        groups["kind"][question.kind].append(number)
        groups["language"][question.language].append(number)
    by_kind = {kind: figures(numbers) for kind, numbers in groups["kind"].items()}
    left_out = [bool(q.sample.pictures) for q, text in zip(questions, answers["shuffled"], strict=True) if text is None]
    return {
        "exact_match": {mode: _mean(kind[mode]["exact_match"] for kind in by_kind.values()) for mode in answers},
        "not_shuffled": {"without_pictures": left_out.count(False), "without_another": left_out.count(True)},
        "all": figures(range(len(questions))),
        "by_kind": by_kind,
        "by_language": {language: figures(numbers) for language, numbers in groups["language"].items()},
    }


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(sum(known) / len(known), 4) if known else None


def table(report: dict) -> str:
    rows = [*report["by_kind"].items()]
    if len(rows) > 1:  # else all of them are the one kind's, and a single language's too
        overall = {mode: {"exact_match": share} for mode, share in report["exact_match"].items()}
        rows = [("all, kinds alike", overall), *rows]
    if len(rows) > 1 or len(report["by_language"]) > 1:
        rows += report["by_language"].items()
    heads = {"right": "right picture", "shuffled": "shuffled picture", "none": "no picture"}
    lines = [f"{'':<18}" + "".join(f"{heads[mode]:>26}" for mode in report["exact_match"])]
    for name, figures in rows:
        lines.append(f"{name:<18}" + "".join(map(_cell, figures.values())))
    left_out = report["not_shuffled"]
    if count := sum(left_out.values()):
        lines.append(
            f"left out of the shuffled figure: {count:,} of {report['all']['right']['count']:,} questions, "
            f"{left_out['without_pictures']:,} without pictures and {left_out['without_another']:,} with no other "
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
    parser.add_argument("--weight", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="held-out .jsonl or .parquet")
    parser.add_argument("--images_path", type=Path, help="folder of a .jsonl's pictures; by default `images` beside it")
    add_limits(parser)
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--num_attention_heads", type=int, default=8, help="of a .pth, which does not say")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--limit", type=int, help="only the first so many lines")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
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
        questions = read_questions(options.data, options.images_path, options.limit, limits_of(options))
        answerer = Answerer.from_weight(
            options.weight, options.vision_model, options.device, options.dtype, options.num_attention_heads
        )
        report, records = score(answerer, questions, options.batch_size)
    except (UserError, OSError) as error:
        raise SystemExit(f"score: {error}") from error
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.answers:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        options.answers.write_text("".join(lines), encoding="utf-8")
    if options.sheet:
        draw_sheet(records, options.sheet)
        print(f"sheet: {options.sheet}")


if __name__ == "__main__":
    main()
