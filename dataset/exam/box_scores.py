"""Questions that are answered with boxes: how well what is said covers what is true, as intersection over union."""

from collections.abc import Iterable, Sequence

from dataset.boxes import boxes_in, named_boxes, overlap
from dataset.exam.answering import answer_all, record_of
from dataset.exam.figures import MODES, SHOWN, wilson_interval
from dataset.exam.questions import Question, wrong_pictures
from model.inference.answerer import Answerer

FOUND, FOUND_WELL = 0.5, 0.75  # IoU from which on a box counts as found
WIDTHS = (10, 12, 16, 9, 9, 9)  # of the columns of the table


def holds_boxes(questions: Sequence[Question]) -> bool:
    """Whether every question has a box in its answer."""
    return bool(questions) and all(boxes_in(question.truth) for question in questions)


def overlaps(truth: str, answer: str) -> list[float]:
    """IoU of each true box with the answer's that is its own, the best pairs first; 0 where there is none.

    Of several true boxes each wants one with its name, if it has a name. Each box too many counts as another 0: else
    who says a hundred boxes has found everything.
    """
    true, said = named_boxes(truth), named_boxes(answer)
    any_name = len(true) == 1
    pairs = [
        (overlap(box, other), number, place)
        for number, (name, box) in enumerate(true) for place, (other_name, other) in enumerate(said)
        if any_name or not name or name.casefold() == other_name.casefold()
    ]  # fmt: skip
    found, taken = [0.0] * max(len(true), len(said)), set()
    for value, number, place in sorted(pairs, key=lambda pair: -pair[0]):
        if ("true", number) not in taken and ("said", place) not in taken:
            taken |= {("true", number), ("said", place)}
            found[number] = value
    return found


def is_found(record: dict, mode: str = "right") -> bool:
    """Whether the answer in a record of score_boxes is good enough to be called right: its mean IoU is FOUND."""
    return (record["iou"][mode] or 0.0) >= FOUND


def judged(questions: Sequence[Question], answers: Sequence[str | None]) -> list[str | None]:
    """For who counts exact matches: the truth in the place of an answer whose mean IoU is FOUND.

    Where not every question is answered with boxes, the answers as they are.
    """
    if not holds_boxes(questions):
        return list(answers)
    return [
        question.truth if answer is not None and _mean(overlaps(question.truth, answer)) >= FOUND else answer
        for question, answer in zip(questions, answers, strict=True)
    ]


def score_boxes(answerer: Answerer, questions: Sequence[Question], batch_size: int = 48) -> tuple[dict, list[dict]]:
    """The report, and one record a question, with the mean IoU of each mode's answer."""
    wrong, values = wrong_pictures(questions), {}
    records = [record_of(question) | {"iou": {}} for question in questions]
    for mode in MODES:
        texts = answer_all(answerer, questions, mode, wrong, batch_size)
        values[mode] = [
            None if text is None else overlaps(question.truth, text)
            for question, text in zip(questions, texts, strict=True)
        ]
        for record, text, found in zip(records, texts, values[mode], strict=True):
            record[mode] = text
            record["iou"][mode] = None if found is None else _mean(found)
    report = {"all": _by_mode(values, records, range(len(questions)))}
    for field in ("kind", "language"):
        groups: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            groups.setdefault(record[field], []).append(number)
        report[f"by_{field}"] = {name: _by_mode(values, records, numbers) for name, numbers in groups.items()}
    return report, records


def _mean(found: Sequence[float]) -> float:
    """Of one answer's boxes."""
    return round(sum(found) / len(found), 4)


def _by_mode(values: dict[str, list], records: Sequence[dict], numbers: Iterable[int]) -> dict[str, dict]:
    by_mode = {}
    for mode, found in values.items():
        asked = [number for number in numbers if found[number] is not None]
        without = sum(not boxes_in(records[number][mode]) for number in asked)
        by_mode[mode] = figures([found[number] for number in asked]) | {"without_box": without}
    return by_mode


def figures(answers: Sequence[Sequence[float]]) -> dict:
    """Mean IoU of the boxes of all answers, and the shares of FOUND (with Wilson's interval) and FOUND_WELL."""
    values = [value for answer in answers for value in answer]
    found, well = (sum(value >= least for value in values) for least in (FOUND, FOUND_WELL))
    means = {"mean_iou": sum(values), "found": found, "found_well": well}
    shares = {name: round(total / len(values), 4) if values else None for name, total in means.items()}
    interval = wilson_interval(found, len(values))
    return {**shares, "interval": interval, "boxes": len(values), "count": len(answers)}


def table(report: dict) -> str:
    """The report as score.py prints it: a row for each mode, and for each kind and language with the right picture."""
    rows = [(SHOWN[mode], found) for mode, found in report["all"].items()]
    for field in ("by_kind", "by_language"):
        if len(report[field]) > 1:
            rows += [(f"  {name}", found["right"]) for name, found in report[field].items()]
    heads = ("mean IoU", f"IoU >= {FOUND}", "", f">= {FOUND_WELL}", "boxes", "no box")
    lines = [f"{'':<20}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True))]
    for name, found in rows:
        if found["mean_iou"] is None:
            lines.append(f"{name:<20}{'-':>10}")
            continue
        cells = [f"{found['mean_iou']:.3f}", f"{found['found']:.3f}", "{:.2f} to {:.2f}".format(*found["interval"]),
                 f"{found['found_well']:.3f}", f"{found['boxes']:,}", f"{found['without_box']:,}"]  # fmt: skip
        lines.append(f"{name:<20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    return "\n".join(lines)
