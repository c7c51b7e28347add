"""An exam in families, `category` in its lines: exact match of each with the right picture, another one, and none.

dataset/exam/emoji_exam.py makes one. Of captions of Emoji World it is counted, too, which of their facts are true.
"""

from collections.abc import Sequence

from dataset.exam.answering import score
from dataset.exam.caption_facts import precision_and_recall
from dataset.exam.figures import MODES, SHOWN, cell, summarize
from dataset.exam.questions import NO_CATEGORY, Question
from model.inference.answerer import Answerer

CAPTIONS = "captions"  # the family whose answers hold several facts


def in_families(questions: Sequence[Question]) -> bool:
    return any(question.category != NO_CATEGORY for question in questions)


def score_families(answerer: Answerer, questions: Sequence[Question], batch_size: int) -> tuple[dict, list[dict]]:
    """The report, with `by_category` (kinds alike in each; of captions the `facts`), and one record a question."""
    report, records = score(answerer, questions, batch_size)
    families: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        families.setdefault(question.category, []).append(number)
    report["by_category"] = {}
    for name, numbers in families.items():
        answers = {mode: [records[number][mode] for number in numbers] for mode in MODES}
        report["by_category"][name] = family = summarize([questions[number] for number in numbers], answers)
        if name == CAPTIONS:
            family["facts"] = {
                mode: precision_and_recall(
                    (answer, questions[number].truth)
                    for number, answer in zip(numbers, texts, strict=True) if answer is not None
                )
                for mode, texts in answers.items()
            }  # fmt: skip
    return report, [
        record | {"category": question.category} for record, question in zip(records, questions, strict=True)
    ]


def table(report: dict) -> str:
    """A row a family and under it one a kind, then the facts of captions."""
    lines = [f"{'':<24}" + "".join(f"{SHOWN[mode]:>26}" for mode in MODES)]
    for name, family in report["by_category"].items():
        figures = {mode: {**family["all"][mode], "exact_match": family["exact_match"][mode]} for mode in MODES}
        lines.append(_row(name, figures))
        if len(family["by_kind"]) > 1:
            lines += [_row(f"  {kind}", figures) for kind, figures in family["by_kind"].items()]
        for mode, facts in family.get("facts", {}).items():
            shares = ", ".join(
                f"{fact} {_share(found['precision'])} of those said, {_share(found['recall'])} of those true"
                for fact, found in facts.items()
            )
            lines.append(f"  facts, {SHOWN[mode]}: {shares}")
    return "\n".join(lines)


def _row(name: str, figures: dict[str, dict]) -> str:
    return f"{name:<24}" + "".join(map(cell, figures.values()))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
