"""Emoji World in motion: clips of a few frames in which things come in, move and leave; emoji_clip_words.py asks.

A clip is a pure function of (seed, split, index), as a scene is, and concepts meet in it by the same rule: what a
held-out clip shows together, no training clip does. Whatever a clip shows, it is as likely backwards: so whoever knows
its frames and not their order has no reason to prefer an answer to the one that is right backwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

from PIL import Image

from dataset.emoji_world import (
    IMAGE_SIZE,
    Scene,
    Thing,
    apart,
    checked_vocabulary,
    render,
    sample_concepts,
    sample_ground,
)

FRAMES = 8
RATE = 1  # frames a second: their times are whole seconds
COUNTS = (1, 2, 3, 3, 3)  # things of a clip: of three there is most to ask
SHORTEST = 3  # frames that a thing is there, at least
SIZES = (52, 66)  # pixels
STEP, FARTHEST = 20, 80  # pixels: from one frame to the next, and in all, so that no place tells where a thing goes
ROOM = 24  # pixels from left to right between the things of the first frame, and of the last: they are named so
WAYS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # left, right, up, down
STILL = -1


@dataclass(frozen=True)
class Actor:
    """A thing in time: from frame `comes` on, no more from frame `leaves` on."""

    concept: int  # index into emoji_world.concepts()
    comes: int  # 0: from the beginning
    leaves: int  # FRAMES: to the end
    way: int  # index into WAYS, or STILL
    x: float  # centre in frame `comes`, pixels
    y: float
    size: float  # side of the drawing, pixels
    angle: float  # degrees, counter-clockwise

    @property
    def step(self) -> float:
        """Pixels from one frame to the next."""
        return 0 if self.way == STILL else min(STEP, FARTHEST / (self.leaves - self.comes - 1))

    def is_there(self, frame: int) -> bool:
        return self.comes <= frame < self.leaves

    def at(self, frame: int) -> Thing:
        passed = self.step * (frame - self.comes)
        x, y = self.x + WAYS[self.way][0] * passed, self.y + WAYS[self.way][1] * passed
        column, row = (min(max(int(3 * middle / IMAGE_SIZE), 0), 2) for middle in (x, y))
        return Thing(self.concept, 3 * row + column, x, y, self.size, self.angle)

    def backwards(self) -> "Actor":
        last = self.at(self.leaves - 1)
        way = self.way if self.way == STILL else self.way ^ 1
        comes, leaves = FRAMES - self.leaves, FRAMES - self.comes
        return replace(self, comes=comes, leaves=leaves, way=way, x=last.x, y=last.y)


@dataclass(frozen=True)
class Clip:
    ground: int  # index into emoji_world.GROUND_RGB
    rgb: tuple[int, int, int]
    actors: tuple[Actor, ...]

    def there(self, frame: int) -> tuple[Thing, ...]:
        """From left to right."""
        return tuple(sorted((a.at(frame) for a in self.actors if a.is_there(frame)), key=lambda thing: thing.x))

    def comers(self) -> list[Actor]:
        """Who comes in after the beginning, in this order; never two at once."""
        return sorted((actor for actor in self.actors if actor.comes > 0), key=lambda actor: actor.comes)

    def leavers(self) -> list[Actor]:
        """Who leaves before the end, in this order; never two at once."""
        return sorted((actor for actor in self.actors if actor.leaves < FRAMES), key=lambda actor: actor.leaves)

    def backwards(self) -> "Clip":
        return replace(self, actors=tuple(actor.backwards() for actor in self.actors))


def sample_clip(seed: int | str, split: str, index: int, vocabulary: int | None = None) -> Clip:
    """The clip number `index` of a split: 1 to 3 things, which never touch.

    split: "train" or "held_out"; vocabulary: only the first so many concepts.
    """
    rng = Random(f"emoji-clips:{seed}:{split}:{index}")
    vocabulary = checked_vocabulary(split, vocabulary, 1, max(COUNTS))
    concepts = sample_concepts(rng, split, vocabulary, rng.choice(COUNTS))
    ground, rgb = sample_ground(rng)
    spans = _sample_spans(rng, len(concepts))
    while True:
        actors = tuple(_sample_actor(rng, *facts) for facts in zip(concepts, spans, strict=True))
        if all(_fit(one, other) for one, other in combinations(actors, 2)):
            return Clip(ground, rgb, actors)


def _sample_spans(rng: Random, count: int) -> list[tuple[int, int]]:
    """When each comes and leaves: never two events at once, so that what came first is no matter of opinion."""
    while True:
        comes = [rng.choice((0, 0, *range(1, FRAMES - SHORTEST + 1))) for _ in range(count)]
        leaves = [rng.choice((*range(SHORTEST, FRAMES), FRAMES, FRAMES)) for _ in range(count)]
        events = [event for event in (*comes, *leaves) if 0 < event < FRAMES]
        long_enough = all(end - start >= SHORTEST for start, end in zip(comes, leaves, strict=True))
        if long_enough and len(set(events)) == len(events):
            return list(zip(comes, leaves, strict=True))


def _sample_actor(rng: Random, concept: int, span: tuple[int, int]) -> Actor:
    """Somewhere, so that it stays inside wherever it goes."""
    way, size, angle = rng.choice((STILL, *range(len(WAYS)))), rng.uniform(*SIZES), rng.uniform(-25, 25)
    actor = Actor(concept, *span, way, 0, 0, size, angle)
    end = actor.at(actor.leaves - 1)
    x, y = (
        rng.uniform(size / 2 - min(0, travelled), IMAGE_SIZE - size / 2 - max(0, travelled))
        for travelled in (end.x, end.y)
    )
    return replace(actor, x=x, y=y)


def _fit(one: Actor, other: Actor) -> bool:
    """Whether two never touch, and stand side by side in the first frame and the last, where both are there."""
    both = [(one.at(f), other.at(f)) for f in range(FRAMES) if one.is_there(f) and other.is_there(f)]
    ends = [(one.at(f), other.at(f)) for f in (0, FRAMES - 1) if one.is_there(f) and other.is_there(f)]
    return all(apart(a, b) for a, b in both) and all(abs(a.x - b.x) >= ROOM for a, b in ends)


def draw_clip(clip: Clip) -> list[Image.Image]:
    """All frames in order, RGB, 224 x 224."""
    return [render(Scene(clip.ground, clip.rgb, clip.there(frame)))[0] for frame in range(FRAMES)]


def shown(things: Sequence[Thing]) -> tuple[int, ...]:
    """Their concepts."""
    return tuple(thing.concept for thing in things)
