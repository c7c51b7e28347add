"""Needles: facts hidden in long texts, and pictures in long rows of them, with questions and their exact answers.

A text or a row is a pure function of (seed, split, index). Every fact has the same form, "The password of the green cat
is honey rocket.", so that one is found by its key alone; others about the same animal or of the same colour stand
beside it, and animals and colours occur in the other sentences as well. The answer is the fact, word for word. What
stands between is made of everyday words by random choice: nothing is read from anywhere, and a sentence is in a text
twice only by chance. Held-out texts ask for pairs of colour and animal, and for passwords, that no training text has;
held-out rows show nothing at a place where training shows it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from dataset.emoji_talks import conversation
from dataset.emoji_world import Scene, name, sample_scene

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "grey")
ANIMALS = (
    "cat", "dog", "fox", "cow", "pig", "horse", "bear", "duck", "lion", "shark", "tiger", "mouse", "spider", "snake",
    "monkey", "elephant", "eagle", "goat", "rabbit", "whale", "dolphin", "deer", "swan", "penguin", "owl", "frog",
    "goose", "snail", "turtle", "camel", "crab", "lizard", "panda", "moose", "kangaroo", "leopard", "parrot",
    "crocodile", "squid", "octopus", "rooster", "scorpion", "peacock", "otter", "zebra", "giraffe",
)  # fmt: skip
PLACES = (
    "tower", "castle", "bridge", "station", "hospital", "garden", "forest", "island", "mountain", "church", "market",
    "kitchen", "window", "river", "school", "museum", "hotel", "temple", "village", "road", "tree", "house", "boat",
    "train", "stadium", "beach", "desert", "hill", "park", "factory",
)  # fmt: skip
THINGS = (
    "umbrella", "ladder", "guitar", "lamp", "candle", "clock", "book", "letter", "key", "hat", "coat", "basket", "drum",
    "hammer", "bell", "chair", "table", "mirror", "map", "ball", "kite", "bread", "cheese", "apple", "lemon", "cake",
    "pizza", "carrot", "flower", "stone", "coin", "ring", "spoon", "pencil", "camera", "radio", "bicycle", "balloon",
)  # fmt: skip
PEOPLE = (
    "the old man",
    "a young woman",
    "the doctor",
    "the teacher",
    "the driver",
    "my sister",
    "the king",
    "a worker",
    "the cook",
    "the artist",
    "the judge",
    "a farmer",
    "the queen",
    "the pilot",
    "our friend",
    "the boy",
    "the girl",
)
DEEDS = ("found", "sold", "lost", "painted", "carried", "bought", "saw", "took", "left", "brought", "hid", "kept")
WAYS = ("slowly", "again", "in the morning", "at night", "for a while", "after the rain", "before lunch", "once more")
WORDS = (  # of passwords
    "rocket", "robot", "battery", "trophy", "ribbon", "anchor", "violin", "trumpet", "banana", "coconut", "tomato",
    "potato", "garlic", "mushroom", "butter", "egg", "salt", "pepper", "ginger", "cherry", "peach", "pear", "mango",
    "melon", "olive", "onion", "rice", "wine", "beer", "honey", "shell", "crown", "shield", "magnet", "plug", "brick",
    "needle", "feather", "badge", "ticket", "wave", "cloud", "snow", "rain", "pump", "pin", "hook", "bottle", "dish",
    "nail", "wheel", "flute", "harp", "banjo", "tulip", "rose", "leaf", "seed", "cactus", "planet", "comet", "engine",
)  # fmt: skip
SENTENCES = (
    "{person} {deed} the {thing} near the {place}.",
    "The {colour} {animal} slept behind the {place} {way}.",
    "On the way to the {place} {person} {deed} {count} of the {thing}s.",
    "There was a {colour} {thing} in the {place}.",
    "{person} and {person} walked from the {place} to the {place} {way}.",
    "Nobody knew why the {animal} {deed} the {colour} {thing}.",
    "The {place} is {count} miles from the {place}.",
    "A {animal} looked at the {thing}, and then {person} {deed} it {way}.",
    "It rained {way}, so {person} {deed} the {thing} at the {place}.",
    "{person} told the story of the {animal} and the {colour} {thing}.",
)
CHOICES = {"colour": COLOURS, "animal": ANIMALS, "place": PLACES, "thing": THINGS, "person": PEOPLE, "deed": DEEDS,
           "way": WAYS}  # fmt: skip
SERIES = (12, 50)  # words of one to be said again
MOST_PICTURES = 40  # a row
FOLDS = 3  # one in so many pairs of colour and animal, and of words, is held out
SPLITS = ("train", "held_out")
Sized = tuple[str, int]  # a sentence with the space before it, and its tokens


@dataclass(frozen=True)
class Fact:
    """What is said of one animal, and can be asked."""

    colour: str
    animal: str
    password: tuple[str, str]  # two of WORDS

    @property
    def sentence(self) -> str:
        return f"The password of the {self.colour} {self.animal} is {' '.join(self.password)}."

    @property
    def question(self) -> str:
        return f"What is the password of the {self.colour} {self.animal}?"


@dataclass(frozen=True)
class Haystack:
    """A text and the facts in it, in their order."""

    text: str
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]  # of each fact: the share of the text before it, in tokens

    def talk(self, facts: Sequence[Fact]) -> list[dict]:
        """Questions about these of its facts and their answers, the text before the first."""
        return conversation([(fact.question, fact.sentence) for fact in facts], self.text)


def haystack(
    place: tuple[int, str, int], length: int, depths: Sequence[float], count_tokens: Callable[[str], int]
) -> Haystack:
    """A text of about `length` tokens, never more, with a fact at each of the depths.

    place: seed, split ("train" or "held_out") and index.
    depths: from 0, where the text begins, to 1, where it ends; each is met to within a sentence.
    count_tokens: of a text, as word_counter gives it.

    Raises:
        ValueError: no such split, fewer than three facts, or a length that they do not leave room for.
    """
    seed, split, index = place
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is neither 'train' nor 'held_out'")
    rng = Random(f"needles:{seed}:{split}:{index}")
    facts = _facts(rng, split, len(depths))
    needles = [(f" {fact.sentence}", count_tokens(fact.sentence)) for fact in facts]
    room = length - sum(size for _, size in needles)
    if room < 0:
        raise ValueError(f"{len(facts)} facts take {length - room} tokens, and the text is to have {length}")
    sentences = _filler(rng, room, count_tokens)
    said = _between(sentences, needles, sorted(depths))
    starts = list(accumulate((size for _, size in said), initial=0))
    hidden = {sentence for sentence, _ in needles}
    met = [start / max(starts[-1], 1) for start, (sentence, _) in zip(starts, said, strict=False) if sentence in hidden]
    return Haystack("".join(sentence for sentence, _ in said).strip(), facts, tuple(met))


def _between(sentences: list[Sized], needles: list[Sized], depths: Sequence[float]) -> list[Sized]:
    """Each needle before the first sentence with so great a share of the others before it."""
    total, before, waiting, said = sum(size for _, size in sentences), 0, list(zip(depths, needles, strict=True)), []
    for sentence in sentences:
        while waiting and before >= waiting[0][0] * total:
            said.append(waiting.pop(0)[1])
        said.append(sentence)
        before += sentence[1]
    return said + [needle for _, needle in waiting]


def word_counter(encode: Callable[[str], Sequence[int]]) -> Callable[[str], int]:
    """How many tokens a text has, its first word as if another stood before it; each word is encoded once.

    Right for tokenizers that never join words, as those of the GPT-2 kind do.
    """
    of_word = functools.cache(lambda word: len(encode(f" {word}")))
    return lambda text: sum(map(of_word, text.split()))


def repetition(place: tuple[int, str, int]) -> list[dict]:
    """A series of words, and the same again from one of them on: practice in finding by what stood before.

    Each word of the answer is found by the word before it. A fact is found so by several, of which none is enough: a
    decoder without this practice learns from facts alone that some password is asked for, and not which.

    place: as of a haystack. No word is a colour or of a password, so that no pair that is held out is ever said.
    """
    seed, split, index = place
    rng = Random(f"series:{seed}:{split}:{index}")
    words = rng.sample(ANIMALS + PLACES + THINGS, rng.randint(*SERIES))
    start = rng.randrange(len(words) // 2)
    return conversation([(f"Say it again from {words[start]} on.", " ".join(words[start:]))], " ".join(words))


def _facts(rng: Random, split: str, count: int) -> tuple[Fact, ...]:
    """Facts with different keys and passwords, mostly two about one animal."""
    if count < 3:
        raise ValueError(f"{count} facts are too few to need a key: take at least 3")
    keys: list[tuple[str, str]] = []
    colours, animals = list(COLOURS), list(ANIMALS)
    while len(keys) < count:
        one = rng.choice(colours), rng.choice(animals)
        other = rng.choice(colours), one[1]
        for key in (one, other) if len(keys) + 1 < count else (one,):
            if key not in keys and is_held_out(*key) == (split == "held_out"):
                keys.append(key)
    passwords = rng.sample(_passwords(split), count)
    rng.shuffle(keys)
    return tuple(Fact(*key, password) for key, password in zip(keys, passwords, strict=True))


def is_held_out(colour: str, animal: str) -> bool:
    """Whether no training text says or asks the password of this animal."""
    return (COLOURS.index(colour) + ANIMALS.index(animal)) % FOLDS == 0


def _passwords(split: str) -> list[tuple[str, str]]:
    """Every word is in both splits, first and last; the pairs are not."""
    places = range(len(WORDS))
    return [
        (WORDS[first], WORDS[last])
        for first in places
        for last in places
        if first != last and ((first + last) % FOLDS == 0) == (split == "held_out")
    ]


def _filler(rng: Random, room: int, count_tokens: Callable[[str], int]) -> list[Sized]:
    """Sentences and their tokens, which take no more than `room` together."""
    found, total = [], 0
    while True:
        sentence = " " + _sentence(rng)
        size = count_tokens(sentence)
        if total + size > room:
            return found
        found.append((sentence, size))
        total += size


def _sentence(rng: Random) -> str:
    form, said = rng.choice(SENTENCES), ""
    for piece in form.split("{"):
        name, closed, rest = piece.partition("}")
        if not closed:
            said += piece
            continue
        said += (str(rng.randint(2, 999)) if name == "count" else rng.choice(CHOICES[name])) + rest
    return said[0].upper() + said[1:]


@dataclass(frozen=True)
class PictureRow:
    """Scenes of Emoji World with one thing each, all different, numbered from 1."""

    scenes: tuple[Scene, ...]

    def talk(self, numbers: Sequence[int], rng: Random) -> list[dict]:
        """Questions about these of its pictures and their answers, all pictures before the first."""
        shown = "\n".join(f"Picture {number}: <image>" for number in range(1, len(self.scenes) + 1))
        return conversation([self._pair(number, rng) for number in numbers], shown)

    def _pair(self, number: int, rng: Random) -> tuple[str, str]:
        """By the number or by the thing; the answer says both."""
        thing = name(self.scenes[number - 1].things[0].concept, "en")
        question = rng.choice((f"What is in picture {number}?", f"Which picture shows the {thing}?"))
        return question, f"Picture {number} shows the {thing}."


def picture_row(place: tuple[int, str, int], count: int, concepts: int = 128) -> PictureRow:
    """place: seed, split and index; count: pictures; concepts: the first so many of Emoji World's."""
    seed, split, index = place
    scenes: list[Scene] = []
    tries, shown = 0, set()
    if not 0 < count <= MOST_PICTURES:
        raise ValueError(f"{count} pictures: a row has 1 to {MOST_PICTURES}")
    while len(scenes) < count:
        scene = sample_scene(f"needles:{seed}:{index}", split, tries, concepts, max_things=1)
        concept, tries = scene.things[0].concept, tries + 1
        if concept not in shown and ((concept + len(scenes)) % FOLDS == 0) == (split == "held_out"):
            scenes.append(scene)
            shown.add(concept)
    return PictureRow(tuple(scenes))
