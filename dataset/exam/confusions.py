"""What was mistaken for what, and in which part of the picture: read off the answers alone.

records: as scripts/score.py --answers writes them (kind, language, question, truth, right: what was answered).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from dataset.emoji_words import PLACES

BETWEEN_NAMES = re.compile(r"\s*[,，、]\s*")
LEAST_NAMES = 3  # different answers of a kind; yes and no are two
SHARE_OF_MOST = 1 / 3  # as many different answers as this share of the kind's that has most
NAME_LETTERS = 24  # at most, in the mean; a Chinese character counts as three
NOTHING = ""  # of a pair: what was said has no counterpart in the truth, or what is true was not said
PLACE_SHARE = 0.9  # of a kind's questions that name a place: else they speak of left and right in passing
PLACE_NUMBERS = {place: number for places in PLACES.values() for number, place in enumerate(places)}
ANY_PLACE = re.compile(
    r"(?<![a-z])(" + "|".join(sorted(PLACE_NUMBERS, key=len, reverse=True)) + r")(?![a-z])", re.IGNORECASE
)


def names_in(answer: str) -> list[str]:
    return [name for name in BETWEEN_NAMES.split(answer.strip()) if name]


def kinds_of_names(records: Sequence[dict]) -> set[str]:
    """The kinds of questions that are answered with names: short ones, of which there are many.

    Places, colours and numbers are few, and a caption's parts are long.
    """
    different: dict[str, set[str]] = defaultdict(set)
    for record in records:
        different[record["kind"]].update(names_in(record["truth"]))
    short = {kind: names for kind, names in different.items() if names and _mean_letters(names) <= NAME_LETTERS}
    most = max(map(len, short.values()), default=0)
    return {kind for kind, names in short.items() if len(names) >= max(LEAST_NAMES, most * SHARE_OF_MOST)}


def _mean_letters(names: set[str]) -> float:
    return sum(3 if letter >= "\u2e80" else 1 for name in names for letter in name) / len(names)


def confusions(records: Sequence[dict]) -> dict[str, Counter[tuple[str, str]]]:
    """By language, how often which name was said for which: (truth, said), either of them maybe NOTHING.

    Names that stand in both lists are right, in whichever order; the others are paired as they stand.
    """
    kinds, counts = kinds_of_names(records), defaultdict(Counter)
    for record in records:
        if record["kind"] in kinds:
            truth, said = Counter(names_in(record["truth"])), Counter(names_in(record["right"]))
            missed, other = (truth - said).elements(), (said - truth).elements()
            counts[record["language"]].update(zip_longest(missed, other, fillvalue=NOTHING))
    return {language: counter for language, counter in counts.items() if counter}


def right_by_place(records: Sequence[dict]) -> dict[str, list[tuple[int, int]]]:
    """By kind, (right, asked) of each of the nine places in reading order; only kinds that ask about places.

    A question's place is its answer where that is one, else the one that it names.
    """
    asked: dict[str, list[tuple[int | None, bool]]] = defaultdict(list)
    for record in records:
        asked[record["kind"]].append((_place_of(record), record["right"] == record["truth"]))
    grids = {}
    for kind, answers in asked.items():
        if sum(place is not None for place, _ in answers) >= PLACE_SHARE * len(answers):
            by_place = [[right for place, right in answers if place == number] for number in range(9)]
            grids[kind] = [(sum(rights), len(rights)) for rights in by_place]
    return grids


def _place_of(record: dict) -> int | None:
    if record["truth"] in PLACE_NUMBERS:
        return PLACE_NUMBERS[record["truth"]]
    named = {place.lower() for place in ANY_PLACE.findall(record["question"])}
    return PLACE_NUMBERS[named.pop()] if len(named) == 1 else None
