"""Boxes in text: `<box> x1 y1 x2 y2`, in a grid of 100 steps a side whatever the size of the picture."""

import re
from collections.abc import Sequence
from typing import NamedTuple

STEPS = 100  # of the grid, along each side of a picture; x to the right, y down
TAG = "<box>"  # plain text: no token is added to any vocabulary
# What a model may write of it: commas or brackets between the numbers, digits behind the point, a capital.
WRITTEN = re.compile(
    r"<\s*box\s*>" + r"[\s,，、;:()\[\]]*([0-9]+(?:\.[0-9]+)?)" + r"[\s,，、;()\[\]]+([0-9]+(?:\.[0-9]+)?)" * 3
    + r"(?![0-9]|\.[0-9])", re.IGNORECASE,
)  # fmt: skip
BEFORE_NAME = re.compile(
    r"[,，、;；:：.。!！?？()\[\]<>\n]"
)  # a box's name is what stands before it, up to such a stop


class Box(NamedTuple):
    """Corners in the grid, 0 to 100 each; left < right and top < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return f"{TAG} {self.left} {self.top} {self.right} {self.bottom}"

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


def box_of_pixels(corners: Sequence[float], size: tuple[int, int]) -> Box:
    """The box of left, top, right and bottom, pixels of a picture of this width and height, cut off at its edges.

    Each corner is the nearest of the grid, and no box is thinner than one step. Right and bottom are where the next
    pixel begins, as Pillow's getbbox() has them. Raises ValueError where nothing of it is in the picture.
    """
    sides = []
    for low, high, length in zip(corners[:2], corners[2:], size, strict=True):
        low, high = max(low, 0), min(high, length)
        if not low < high:
            raise ValueError(f"box {tuple(corners)}: nothing of it is in a picture of {size[0]} x {size[1]} pixels")
        first = min(round(STEPS * low / length), STEPS - 1)
        sides.append((first, max(round(STEPS * high / length), first + 1)))
    (left, right), (top, bottom) = sides
    return Box(left, top, right, bottom)


def named_boxes(text: str) -> list[tuple[str, Box]]:
    """Every box of a text, in its order, with the name that stands before it, or "".

    What is no box is passed over: too few numbers, numbers outside the grid, corners in the wrong order.
    """
    found, end = [], 0
    for match in WRITTEN.finditer(text):
        left, top, right, bottom = numbers = [float(number) for number in match.groups()]
        if max(numbers) <= STEPS and round(left) < round(right) and round(top) < round(bottom):
            name = BEFORE_NAME.split(text[end : match.start()].rstrip(" :：,，"))[-1].strip(" -*")
            found.append((name, Box(*map(round, numbers))))
        end = match.end()
    return found


def boxes_in(text: str) -> list[Box]:
    """Every box of a text, in its order; see named_boxes."""
    return [box for _, box in named_boxes(text)]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0 to 1."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    common = max(width, 0) * max(height, 0)
    return common / (a.area + b.area - common)
