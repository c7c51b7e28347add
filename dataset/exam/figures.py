"""What answers are worth: exact match by kind of question and language, with Wilson's intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dataset.exam.questions import Question

SHOWN = {"right": "right picture", "shuffled": "another picture", "none": "no picture"}  # by mode, in tables
MODES = tuple(SHOWN)  # the question's picture, another line's, no picture


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, proportion = 1.959964, right / count
    middle = (proportion + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(proportion * (1 - proportion) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(max(0.0, middle - half), 4), round(middle + half, 4)


def cell(figure: dict) -> str:
    """An exact match with its interval, 26 characters wide, for tables; a mean of kinds has no interval."""
    if figure["exact_match"] is None:
        return f"{'-':>10}{'':<16}"
    interval = "{:.2f} to {:.2f}".format(*figure["interval"]) if "interval" in figure else ""
    return f"{figure['exact_match']:>10.3f}  {interval:<14}"


def summarize(questions: Sequence[Question], answers: dict[str, list[str | None]]) -> dict:
    """Exact match: overall (kinds weigh alike), by kind, by language, each with interval and count.

    It is None where nothing was asked, as of the shuffled pictures of questions without pictures. answers: by mode, of
    MODES or some of them.
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
    shuffled = answers.get("shuffled", [""] * len(questions))
    unshuffled = [q.sample.pictures for q, text in zip(questions, shuffled, strict=True) if text is None]
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
