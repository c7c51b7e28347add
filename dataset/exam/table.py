"""An exam as VLMEvalKit's table: a .tsv that its run.py, and every reader of this project, takes.

Rows that show the same pictures share them: the first holds them in base64, byte for byte as they were, the others
name its index. Pictures come first there, wherever the text had them.
"""

import base64
import csv
from collections.abc import Sequence
from pathlib import Path

from dataset.exam.questions import NO_CATEGORY, Question
from dataset.formats import LETTERS
from model.files import written_aside
from model.messages import UserError

ALWAYS = ("index", "image", "question")


def write_table(questions: Sequence[Question], path: Path) -> None:
    """One row a question: index, image, question, A and on where any has choices, answer, category, kind, language.

    Raises UserError where a question stands in a longer conversation, which a row has no place for.
    """
    most = max((len(question.choices) for question in questions), default=0)
    names = (*ALWAYS, *LETTERS[:most], "answer", "category", "kind", "language", "hint")
    first_row: dict[tuple, int] = {}  # of pictures
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, restval="", delimiter="\t", lineterminator="\n")
        table.writeheader()
        for index, question in enumerate(questions):
            sample = question.sample
            if len(sample.messages) != 2:
                raise UserError(
                    f"{sample.where}: a row of a table holds one question and its answer, this conversation has "
                    f"{len(sample.messages)} turns: leave it out"
                )
            shown = first_row.setdefault(sample.pictures, index) if sample.pictures else index
            named = dict(zip(LETTERS, question.choices, strict=False))
            table.writerow({
                "index": index, "image": _cell(sample.pictures) if shown == index else shown,
                "question": sample.extra.get("question", question.text), **named, "answer": question.truth,
                "category": question.kind if question.category == NO_CATEGORY else question.category,
                "kind": question.kind, "language": question.language, "hint": sample.extra.get("hint", ""),
            })  # fmt: skip


def _cell(pictures: Sequence[Path | bytes]) -> str:
    contents = (picture if isinstance(picture, bytes) else picture.read_bytes() for picture in pictures)
    cells = [base64.b64encode(content).decode() for content in contents]
    return cells[0] if len(cells) == 1 else str(cells or "")
