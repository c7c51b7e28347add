"""Questions that are answered yes or no, as POPE asks whether a thing is there: what a model says too readily."""

import re
from collections.abc import Iterable, Sequence

from dataset.exam.answering import answer_all, record_of
from dataset.exam.figures import MODES, SHOWN, wilson_interval
from dataset.exam.questions import Question, wrong_pictures
from model.inference.answerer import Answerer

MEASURES = ("accuracy", "precision", "recall", "f1", "yes_rate")
WIDTHS = (10, 16, 11, 8, 8, 10, 9)  # of the columns of the table


def is_yes_no(questions: Sequence[Question]) -> bool:
    """Whether every question has one of the two for its answer."""
    return bool(questions) and all(question.truth.lower() in ("yes", "no") for question in questions)


def yes_or_no(answer: str) -> str | None:
    """ "yes" or "no" where one of them stands in the answer as a word and the other does not: VLMEvalKit's rule."""
    said = {"yes", "no"} & set(re.findall(r"\w+", answer.lower()))
    return said.pop() if len(said) == 1 else None


def score_yes_no(answerer: Answerer, questions: Sequence[Question], batch_size: int = 48) -> tuple[dict, list[dict]]:
    """The report, and one record a question.

    A question of several categories, with commas between them, counts once in each, and so often in all.
    """
    wrong = wrong_pictures(questions)
    answers = {mode: answer_all(answerer, questions, mode, wrong, batch_size) for mode in MODES}
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        for category in question.category.split(","):
            groups.setdefault(category.strip(), []).append(number)
    every = [number for numbers in groups.values() for number in numbers]
    report = {"all": _by_mode(questions, answers, every)}
    report["by_category"] = {name: _by_mode(questions, answers, numbers) for name, numbers in groups.items()}
    records = [
        record_of(question) | {"category": question.category} | {mode: texts[n] for mode, texts in answers.items()}
        for n, question in enumerate(questions)
    ]
    return report, records


def _by_mode(questions: Sequence[Question], answers: dict[str, list[str | None]], numbers: Iterable[int]) -> dict:
    return {
        mode: figures([(questions[n].truth.lower(), yes_or_no(texts[n])) for n in numbers if texts[n] is not None])
        for mode, texts in answers.items()
    }


def figures(pairs: Sequence[tuple[str, str | None]]) -> dict:
    """Of (truth, said) pairs. What is neither yes nor no is wrong, and counts as no where yes is what is looked for."""
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    true, said = (sum(pair[place] == "yes" for pair in pairs) for place in (0, 1))
    right, count = sum(truth == answer for truth, answer in pairs), len(pairs)
    precision, recall = (hits / total if total else 0.0 for total in (said, true))
    shares = {
        "accuracy": right / count if count else None,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_rate": said / count if count else None,
    }
    rounded = {name: None if share is None else round(share, 4) for name, share in shares.items()}
    failed = sum(answer is None for _, answer in pairs)
    return {**rounded, "interval": wilson_interval(right, count), "count": count, "failed": failed}


def table(report: dict) -> str:
    """The report as score.py prints it: a row for each mode, and for each category with the right picture."""
    rows = [(SHOWN[mode], found) for mode, found in report["all"].items()]
    if len(report["by_category"]) > 1:
        rows += [(f"  {name}", found["right"]) for name, found in report["by_category"].items()]
    heads = ("accuracy", "", *MEASURES[1:], "neither")
    lines = [f"{'':<20}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True))]
    for name, found in rows:
        if found["accuracy"] is None:
            lines.append(f"{name:<20}{'-':>10}")
            continue
        cells = [f"{found['accuracy']:.3f}", "{:.2f} to {:.2f}".format(*found["interval"])]
        cells += [f"{found[measure]:.3f}" for measure in MEASURES[1:]] + [f"{found['failed']:,}"]
        lines.append(f"{name:<20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    return "\n".join(lines)
