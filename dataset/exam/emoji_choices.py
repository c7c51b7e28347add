"""Emoji World with four choices a question, as MMStar asks: a picture, one right answer, three others of its kind.

Scenes are held-out ones, which no other file shows; the right letter is each of the four equally often. What is there
beside the thing that is asked about comes first among the wrong names and places: whoever only knows what the picture
holds, and not where, is wrong.
"""

import io
from dataclasses import dataclass
from random import Random

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.emoji_talks import conversation
from dataset.exam.questions import Question
from dataset.formats import LETTERS, choice_prompt
from dataset.samples import Sample
from model.processing import IMAGE_TAG

KINDS = ("what", "at", "where", "count", "colour")  # yes and no are two choices
CHOICES = 4
SEED = 5  # of the scenes, beside those of scripts/build_emoji_world.py


def emoji_choices(count: int, seed: int = 42, vocabulary: int | None = None) -> list[Question]:
    """So many questions, one of each kind a scene, in both languages by turns; `category` is the kind."""
    letters = _balanced(count, Random(f"letters:{seed}"))
    questions = []
    for number in range(count):
        index, place = divmod(number, len(KINDS))
        scene = world.sample_scene(seed * 10 + SEED, "held_out", index, vocabulary)
        kind, language = KINDS[place], world.LANGUAGES[(index + place) % 2]
        rng = Random(f"choices:{seed}:{number}")
        text, answer = words.ask(scene, kind, language, rng, vocabulary)
        offered = _Wrong(scene, language, rng, vocabulary).beside(kind, answer)
        offered.insert(LETTERS.index(letters[number]), answer)
        questions.append(_question(number, scene, kind, language, text, tuple(offered), letters[number]))
    return questions


def _balanced(count: int, rng: Random) -> list[str]:
    """Letters, each equally often in every four."""
    letters = []
    while len(letters) < count:
        letters += rng.sample(LETTERS[:CHOICES], CHOICES)
    return letters[:count]


def _question(
    number: int, scene: world.Scene, kind: str, language: str, text: str, offered: tuple[str, ...], letter: str
) -> Question:
    picture = io.BytesIO()
    world.render(scene)[0].save(picture, "JPEG", quality=world.QUALITY)
    prompt = f"{IMAGE_TAG}\n{choice_prompt(text, offered)}"
    sample = Sample(
        f"emoji_choices:{number}", conversation([(prompt, letter)]), (picture.getvalue(),),
        extra={"question": text, **dict(zip(LETTERS, offered, strict=False))},
    )  # fmt: skip
    return Question(sample, letter, kind, language, kind, offered)


@dataclass(frozen=True)
class _Wrong:
    """Three answers of one kind that are not true of a scene."""

    scene: world.Scene
    language: str
    rng: Random
    vocabulary: int | None

    def beside(self, kind: str, answer: str) -> list[str]:
        likely = {
            "what": self._lists, "at": self._names, "where": self._places,
            "count": lambda: self._shuffled(words.NUMBERS[self.language][:CHOICES]),
            "colour": lambda: self._shuffled(words.COLOURS[self.language]),
        }[kind]()  # fmt: skip
        return [other for other in dict.fromkeys(likely) if other != answer][: CHOICES - 1]

    def _shuffled(self, options: tuple[str, ...]) -> list[str]:
        return self.rng.sample(options, len(options))

    def _names(self) -> list[str]:
        """Those of the scene's things, then others."""
        there = [world.name(thing.concept, self.language) for thing in self.scene.things]
        return self._shuffled(tuple(there)) + self._absent(CHOICES)

    def _absent(self, count: int) -> list[str]:
        """Names that nothing in the scene has, all different."""
        there = {world.name(thing.concept, self.language) for thing in self.scene.things}
        size = self.vocabulary or len(world.concepts())
        every = {world.name(concept, self.language): None for concept in range(size)}
        return self.rng.sample([name for name in every if name not in there], count)

    def _lists(self) -> list[str]:
        """As many names as the scene has things, and none of theirs."""
        count = len(self.scene.things)
        names = self._absent(count * (CHOICES - 1))
        sign = "、" if self.language == "zh" else ", "
        return [sign.join(names[start : start + count]) for start in range(0, len(names), count)]

    def _places(self) -> list[str]:
        """Those where something else is, then others."""
        places = words.PLACES[self.language]
        taken = tuple(places[thing.place] for thing in self.scene.things)
        return self._shuffled(taken) + self._shuffled(places)
