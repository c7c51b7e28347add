"""The boxes of a text drawn on its picture, each in a colour of its own with its name beside it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dataset.boxes import STEPS, Box, named_boxes
from dataset.fonts import font_for

# Light, and far from each other in hue; each line lies on a wider dark one, so that it shows on any ground.
COLOURS = (
    (255, 214, 10),
    (0, 229, 255),
    (255, 110, 160),
    (118, 255, 3),
    (255, 160, 40),
    (205, 160, 255),
    (255, 255, 255),
)
DARK = (20, 20, 20)
LEAST_SIDE = 448  # pixels: a smaller picture is drawn larger, or its names could not be read
MOST_BOXES = 40  # that are drawn; who says more has gone astray
MOST_LETTERS = 24  # of a name

Corners = tuple[int, int, int, int]


def draw_boxes(picture: Image.Image, text: str, least_side: int = LEAST_SIDE) -> Image.Image | None:
    """The picture, RGB, with every box of the text; None where the text has none.

    A box without a name has its number where there are several, and so has one whose name no font here can draw.
    least_side: pixels of the longer side, at least.
    """
    named = named_boxes(text)[:MOST_BOXES]
    if not named:
        return None
    factor = max(1.0, least_side / max(picture.size))
    drawn = picture.convert("RGB").resize([max(1, round(side * factor)) for side in picture.size])
    draw, longer = ImageDraw.Draw(drawn), max(drawn.size)
    width, font_size = max(2, longer // 180), max(11, longer // 28)
    corners = [_pixels(box, drawn.size) for _, box in named]
    for number, frame in enumerate(corners):
        draw.rectangle([frame[0] - 1, frame[1] - 1, frame[2] + 1, frame[3] + 1], outline=DARK, width=width + 2)
        draw.rectangle(frame, outline=COLOURS[number % len(COLOURS)], width=width)
    taken: list[Corners] = []
    for number, (name, _) in enumerate(named):
        label, font = _label(name, number, len(named), font_size)
        if label:
            plate = _place(corners[number], _size(label, font), drawn.size, taken)
            taken.append(plate)
            draw.rectangle(plate, fill=COLOURS[number % len(COLOURS)], outline=DARK)
            draw.text((plate[0] + 3, (plate[1] + plate[3]) / 2), label, DARK, font, "lm")
    return drawn


def _pixels(box: Box, size: tuple[int, int]) -> Corners:
    """The first and the last pixel of the box in each direction; a picture narrower than the grid has one at least."""
    left, right = (round(corner * size[0] / STEPS) for corner in (box.left, box.right))
    top, bottom = (round(corner * size[1] / STEPS) for corner in (box.top, box.bottom))
    return min(left, right - 1), min(top, bottom - 1), right - 1, bottom - 1


def _label(name: str, number: int, count: int, font_size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    cut = name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}..."
    if cut and (font := font_for(cut, font_size)):
        return cut, font
    return str(number + 1) if count > 1 else "", ImageFont.load_default(font_size)


def _size(label: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Of the plate that it stands on."""
    ascent, descent = font.getmetrics()
    return round(font.getlength(label)) + 7, ascent + descent + 2


def _place(frame: Corners, plate: tuple[int, int], size: tuple[int, int], taken: Sequence[Corners]) -> Corners:
    """Above the box, below it, or in one of its corners: where it covers least of the names that stand there."""
    (left, top, right, bottom), (width, height) = frame, plate
    places = [(left, top - height), (left, bottom + 1), (left, top), (right - width, bottom - height),
              (right - width, top), (left, bottom - height), (right - width, top - height)]  # fmt: skip
    inside = [
        (max(0, min(x, size[0] - width - 1)), y) for x, y in places if 0 <= y <= size[1] - height - 1
    ]  # fmt: skip
    found = [(x, y, x + width, y + height) for x, y in inside or [(0, 0)]]
    return min(found, key=lambda place: sum(_common(place, other) for other in taken))


def _common(a: Corners, b: Corners) -> int:
    """Pixels that lie in both."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
