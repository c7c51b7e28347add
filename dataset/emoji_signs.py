"""Emoji World's fine print: larger scenes of small things and of signs whose words and numbers are too small at 224 px.

A scene is 896 px wide and high: four of the tower's pictures. Squeezed to one of them a letter is 7 px high, too small
for the tower; cut into tiles it keeps its 28. A scene is a pure function of (seed, split, index). One in eight pairs of
a board's colour and a text is for held-out scenes alone, and these have no other: what stands on a sign there cannot be
remembered by its colour. The letters are Aileron Regular, the font inside Pillow.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

from dataset import emoji_world as world

IMAGE_SIZE = 896  # pixels per side
PLACE_SIZE = IMAGE_SIZE / 3  # of the nine places of things
PLACE_MARGIN = 40  # pixels between the middle of a thing and the edge of its place, so that it is clearly there
THING_SIZES = (100, 150)  # pixels per side, as in world.Thing
FONT_SIZES = (36, 44)  # pixels; a capital letter has seven tenths of that
BOARD_WIDTHS, BOARD_HEIGHTS = (190, 230), (70, 84)  # pixels, whatever the text: a board's size tells nothing of it
BORDER, CORNER = 4, 10  # pixels, the width of the line and the radius
GAP = 10  # pixels between neighbours, and to the picture's edge
CLEAR = 6  # pixels between a text and the edge of a close-up
TRIES = 60  # places for one thing or sign before the scene is begun anew
BLACK, WHITE = (20, 20, 20), (255, 255, 255)
BOARDS = {  # by the place of its name in words.COLOURS and of its ground in world.GROUND_RGB: the board, the letters
    0: (WHITE, BLACK), 2: ((185, 25, 35), WHITE), 4: ((255, 205, 0), BLACK), 5: ((0, 105, 55), WHITE),
    6: ((15, 60, 165), WHITE),
}  # fmt: skip
# Short, everyday, and no two that differ by one letter alone.
WORDS = (
    "AIR", "BANK", "BEACH", "BOOK", "BREAD", "BUS", "CAFE", "CASH", "DOOR", "EGGS", "EXIT", "FARM", "FIRE", "FISH",
    "FLOOR", "FOOD", "GATE", "GYM", "HOTEL", "ICE", "JUICE", "KEYS", "LIFT", "LUNCH", "MILK", "MUSIC", "NORTH", "OPEN",
    "PARK", "PIZZA", "POST", "QUIET", "SALE", "SOUP", "STOP", "TAXI", "TEA", "TRAIN", "WATER", "ZOO",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(10, 100))
HELD_OUT = 8  # one pair of colour and text in so many is never in training
Corners = tuple[int, int, int, int]  # left, top, right, bottom, pixels


@dataclass(frozen=True)
class Sign:
    text: str  # of WORDS or NUMBERS
    colour: int  # of BOARDS
    box: Corners  # right and bottom are outside, as in Pillow's crop
    font_size: int  # pixels


@dataclass(frozen=True)
class SignScene(world.Scene):
    """A scene whose things lie in the ninths of a larger picture, with two to four signs, in the order of BOARDS."""

    signs: tuple[Sign, ...]


def sample_sign_scene(seed: int | str, split: str, index: int, vocabulary: int | None = None) -> SignScene:
    """The scene number `index` of a split: two to four things and as many signs, of both words and numbers, all apart.

    split, vocabulary: as in world.sample_scene. Raises UserError for too small a vocabulary.
    """
    rng = Random(f"emoji-signs:{seed}:{split}:{index}")
    vocabulary = world.checked_vocabulary(split, vocabulary, 2, 4)
    chosen = world.sample_concepts(rng, split, vocabulary, rng.randint(2, 4))
    ground, rgb = world.sample_ground(rng)
    texts = _sample_texts(rng, split, ground)
    while (placed := _place(rng, chosen, texts)) is None:
        pass
    return SignScene(ground, rgb, *placed)


def texts_of(colour: int, split: str, texts: Sequence[str]) -> list[str]:
    """Those of WORDS or of NUMBERS that may stand on boards of a colour in a split."""
    first = 3 * list(BOARDS).index(colour)  # no text is held out with two colours
    return [text for n, text in enumerate(texts, first) if (n % HELD_OUT == 0) == (split == "held_out")]


def _sample_texts(rng: Random, split: str, ground: int) -> list[tuple[int, str]]:
    """Colours, all different and none the ground's, and texts, all different, of words and numbers half each."""
    colours = sorted(rng.sample([colour for colour in BOARDS if colour != ground], rng.randint(2, 4)))
    kinds = [WORDS, NUMBERS] * 2
    if len(colours) == 3 and rng.random() < 0.5:  # else there would be more words than numbers
        kinds.reverse()
    kinds = kinds[: len(colours)]
    rng.shuffle(kinds)
    chosen: dict[str, int] = {}
    for colour, texts in zip(colours, kinds, strict=True):
        text = rng.choice([text for text in texts_of(colour, split, texts) if text not in chosen])
        chosen[text] = colour
    return [(colour, text) for text, colour in chosen.items()]


def _place(rng: Random, chosen: list[int], texts: list[tuple[int, str]]) -> tuple | None:
    """Things and signs, placed freely; None where the rest finds no room."""
    boxes: list[Corners] = []
    things = []
    for concept, place in zip(chosen, rng.sample(range(9), len(chosen)), strict=True):
        if (thing := _place_thing(rng, concept, place, boxes)) is None:
            return None
        things.append(thing)
        boxes.append(world.square_of(thing))
    signs = []
    for colour, text in texts:
        width, height = rng.randint(*BOARD_WIDTHS), rng.randint(*BOARD_HEIGHTS)
        if (box := _place_board(rng, width, height, boxes)) is None:
            return None
        signs.append(Sign(text, colour, box, rng.randint(*FONT_SIZES)))
        boxes.append(box)
    return tuple(sorted(things, key=lambda thing: thing.place)), tuple(signs)


def _place_thing(rng: Random, concept: int, place: int, boxes: list[Corners]) -> world.Thing | None:
    """Anywhere in its ninth, its middle clearly there."""
    left, top = place % 3 * PLACE_SIZE, place // 3 * PLACE_SIZE
    for _ in range(TRIES):
        x, y = (edge + rng.uniform(PLACE_MARGIN, PLACE_SIZE - PLACE_MARGIN) for edge in (left, top))
        thing = world.Thing(concept, place, x, y, rng.uniform(*THING_SIZES), rng.uniform(-25, 25))
        if _is_free(world.square_of(thing), boxes):
            return thing
    return None


def _place_board(rng: Random, width: int, height: int, boxes: list[Corners]) -> Corners | None:
    for _ in range(TRIES):
        left, top = rng.randint(GAP, IMAGE_SIZE - GAP - width), rng.randint(GAP, IMAGE_SIZE - GAP - height)
        box = (left, top, left + width, top + height)
        if _is_free(box, boxes):
            return box
    return None


def _is_free(box: Corners, others: list[Corners]) -> bool:
    left, top, right, bottom = box[0] - GAP, box[1] - GAP, box[2] + GAP, box[3] + GAP
    inside = min(left, top) >= 0 and max(right, bottom) <= IMAGE_SIZE
    return inside and all(
        right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top for other in others
    )


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """With the letters where FreeType puts them, whether or not a machine has the library that shapes text."""
    return ImageFont.load_default(size).font_variant(layout_engine=ImageFont.Layout.BASIC)


def render(scene: SignScene) -> Image.Image:
    """The picture, RGB 896 x 896."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.rgb)
    for thing in scene.things:
        glyph = world.draw_thing(thing)
        picture.paste(glyph, world.square_of(thing)[:2], glyph)
    draw = ImageDraw.Draw(picture)
    for sign in scene.signs:
        board, letters = BOARDS[sign.colour]
        left, top, right, bottom = sign.box
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), CORNER, board, letters, BORDER)
        middle = ((left + right) / 2, (top + bottom) / 2)
        draw.text(middle, sign.text, letters, _font(sign.font_size), anchor="mm")
    return picture


@dataclass(frozen=True)
class CloseUp:
    """A piece of a scene in its own size, as large as a picture of Emoji World, in which no text is cut."""

    left: int  # pixels of the scene
    top: int
    signs: tuple[Sign, ...]  # whose text is in it, one or more


def sample_close_up(scene: SignScene, rng: Random) -> CloseUp:
    """Around a sign; boards at its edges may be cut, and things."""
    texts = {sign: text_box(sign) for sign in scene.signs}
    while True:
        box = texts[rng.choice(scene.signs)]
        left, top = (
            rng.randint(max(high + CLEAR - world.IMAGE_SIZE, 0), min(low - CLEAR, IMAGE_SIZE - world.IMAGE_SIZE))
            for low, high in zip(box[:2], box[2:], strict=True)
        )
        right, bottom = left + world.IMAGE_SIZE, top + world.IMAGE_SIZE
        seen = [b[0] < right and b[2] > left and b[1] < bottom and b[3] > top for b in texts.values()]
        whole = [b[0] >= left and b[2] <= right and b[1] >= top and b[3] <= bottom for b in texts.values()]
        if seen == whole:
            return CloseUp(left, top, tuple(sign for sign, there in zip(texts, whole, strict=True) if there))


def text_box(sign: Sign) -> Corners:
    """Where its letters are."""
    x, y = (sum(sign.box[side::2]) / 2 for side in (0, 1))
    left, top, right, bottom = _font(sign.font_size).getbbox(sign.text, anchor="mm")
    return math.floor(x + left), math.floor(y + top), math.ceil(x + right), math.ceil(y + bottom)


def render_close_up(scene: SignScene, close_up: CloseUp) -> Image.Image:
    """RGB 224 x 224."""
    left, top = close_up.left, close_up.top
    return render(scene).crop((left, top, left + world.IMAGE_SIZE, top + world.IMAGE_SIZE))


def attribution() -> str:
    """What must stand beside every picture with signs."""
    font = "Letters on signs: Aileron Regular (https://dotcolon.net/fonts/aileron), CC0, as Pillow ships it."
    return f"{world.attribution()}\n{font}"
