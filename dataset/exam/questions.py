"""What an exam asks: the last answer of each line of a data file, and which wrong picture each question may get."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.formats import choices_of
from dataset.options import ReadOptions
from dataset.readers.opening import left_out, open_data
from dataset.samples import BadSample, DataError, Sample
from model.processing import IMAGE_TAG


@dataclass(frozen=True)
class Question:
    sample: Sample
    truth: str  # of a question with choices the letter of the right one
    kind: str
    language: str
    category: str = "all"
    choices: tuple[str, ...] = ()  # what stands under A, B and on

    @property
    def text(self) -> str:
        return self.sample.messages[-2]["content"].replace(IMAGE_TAG, "").strip()


def read_questions(path: Path, options: ReadOptions | None = None, limit: int | None = None) -> list[Question]:
    """One question a line; `kind`, `language` and `category` are the line's own fields where it has them.

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
        facts = {name: str(sample.extra.get(name, "all")) for name in ("kind", "language", "category")}
        offered = choices_of(sample.extra) if "question" in sample.extra else ()  # which only `choices` leaves there
        questions.append(Question(sample, sample.messages[-1]["content"].strip(), choices=offered, **facts))
    if bad:
        print(left_out(bad, count, "lines"), file=sys.stderr)
    return questions


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
