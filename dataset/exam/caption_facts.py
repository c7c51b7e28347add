"""How much of a caption of Emoji World is true: its facts, read off the sentence, against those of the right one."""

import re
from collections.abc import Iterable

from dataset.emoji_words import COLOURS, NUMBERS, PLACES

FACTS = ("things", "places", "ground", "count")
ENGLISH = re.compile(r"(\w+) things? on an? (\w+) ground: (.+?)\.?$", re.IGNORECASE)
CHINESE = re.compile("(.+?)背景上有(.+?)样东西[：:](.+?)。?$")


def facts(caption: str) -> dict[str, frozenset]:
    """By FACTS, in the caption's own words: the things' names, (name, place), the ground's colour, the number.

    A sentence of another form, or a part of one, states nothing.
    """
    if match := CHINESE.search(caption):
        language, (ground, number, listed) = "zh", match.groups()
        pairs = [tuple(reversed(part.split("是", 1))) for part in listed.split("，") if "是" in part]
    elif match := ENGLISH.search(caption):
        language, (number, ground, listed) = "en", match.groups()
        pairs = [tuple(part.split(" at the ", 1)) for part in listed.split(", ") if " at the " in part]
    else:
        return dict.fromkeys(FACTS, frozenset())
    return {
        "things": frozenset(name for name, _ in pairs),
        "places": frozenset((name, place) for name, place in pairs if place in PLACES[language]),
        "ground": frozenset({ground.lower()} & set(COLOURS[language])),
        "count": frozenset({number.lower()} & set(NUMBERS[language])),
    }


def precision_and_recall(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, float | None]]:
    """Of all captions together, by FACTS. pairs: what was said, what is true. None: nothing was said, or is true."""
    said, true, both = (dict.fromkeys(FACTS, 0) for _ in range(3))
    for answer, truth in pairs:
        stated, right = facts(answer), facts(truth)
        for name in FACTS:
            said[name] += len(stated[name])
            true[name] += len(right[name])
            both[name] += len(stated[name] & right[name])
    return {
        name: {
            "precision": round(both[name] / said[name], 4) if said[name] else None,
            "recall": round(both[name] / true[name], 4) if true[name] else None,
        }
        for name in FACTS
    }
