"""What an exam asks: the last answer of each line of a data file, and which wrong picture each question may get."""

import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.formats import choices_of
from dataset.options import ReadOptions
from dataset.readers.opening import left_out, open_data
from dataset.samples import BadSample, DataError, Sample
from model.processing import IMAGE_TAG

NO_CATEGORY = "all"  # of a line that has none


@dataclass(frozen=True)
class Question:
    sample: Sample
    truth: str  # of a question with choices the letter of the right one
    kind: str
    language: str
    category: str = NO_CATEGORY
    choices: tuple[str, ...] = ()  # what stands under A, B and on

    @property
    def text(self) -> str:
        return self.sample.messages[-2]["content"].replace(IMAGE_TAG, "").strip()


def read_questions(
    path: Path, options: ReadOptions | None = None, limit: int | None = None, spread: int = 0
) -> list[Question]:
    """One question a line; `kind`, `language` and `category` are the line's own fields where it has them.

    limit: only the first so many lines. spread: of these only so many, of all kinds, languages and categories alike,
    evenly chosen; 0: all. Lines that cannot be read, or whose pictures cannot, are left out, and stderr says so.
    """
    samples, questions, bad = open_data(path, options), [], []
    readable: set[Path] = set()  # many questions are about one picture
    count = min(len(samples), limit or len(samples))
    numbers = evenly_spread(_groups(samples, count, bad), spread) if spread else range(count)
    for index in numbers:
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
        questions.append(question_of(sample))
    if bad:
        print(left_out(bad, count, "lines"), file=sys.stderr)
    return questions


def question_of(sample: Sample) -> Question:
    """The last question of a conversation. Raises DataError where it ends otherwise."""
    roles = [message.get("role") for message in sample.messages[-2:]]
    if roles != ["user", "assistant"]:
        raise DataError(f"{sample.where}: the last two turns must be a question and its answer, they are {roles}")
    offered = choices_of(sample.extra) if "question" in sample.extra else ()  # which only `choices` leaves there
    return Question(sample, sample.messages[-1]["content"].strip(), choices=offered, **_facts(sample))


def _facts(sample: Sample) -> dict[str, str]:
    return {name: str(sample.extra.get(name, NO_CATEGORY)) for name in ("kind", "language", "category")}


def _groups(samples: Sequence[Sample], count: int, bad: list[BadSample]) -> list[tuple | None]:
    """Kind, language and category of the first `count` lines; None for one that cannot be read, which goes to `bad`."""
    groups: list[tuple | None] = []
    for index in range(count):
        try:
            groups.append(tuple(_facts(samples[index]).values()))
        except BadSample as error:
            bad.append(error)
            groups.append(None)
    return groups


def evenly_spread(groups: Sequence[Hashable | None], count: int) -> list[int]:
    """The numbers of `count` of these, rising: as many of each group as of any other that has so many, evenly chosen.

    None is of no group, and never chosen.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        if group is not None:
            members[group].append(number)
    shares, left = dict.fromkeys(members, 0), min(count, sum(map(len, members.values())))
    while left:
        for group in [group for group, numbers in members.items() if shares[group] < len(numbers)][:left]:
            shares[group] += 1
            left -= 1
    chosen = [
        numbers[place * len(numbers) // shares[group]]
        for group, numbers in members.items() for place in range(shares[group])
    ]  # fmt: skip
    return sorted(chosen)


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
