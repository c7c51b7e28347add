"""Pictures that look the same: copies that were encoded anew, scaled, or made a little brighter or darker.

thumbnail        what is left of a picture when it is averaged in 16 x 16 cells
perceptual hash  its five lowest frequencies and its two mean colours, in wide steps: a copy has the same, or its
                 neighbour in the next step where it lies near the border. Flat grounds have none of the higher
                 frequencies, so nothing in the hash is left to chance.

Only pictures that share a hash are compared, by their thumbnails, so that the work grows with the pictures and not
with their square.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 16  # cells of a thumbnail
FREQUENCIES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
STEP, BORDER = 64.0, 0.3  # of the hash: its width, and the part of it at either end in which the next step counts, too
COLOUR_SCALE = 3.0  # a mean colour moves less than a frequency
NORMAL, FLATTEST = 64.0, 32.0  # levels: the contrast that a hash is made at, and the least that is raised to it
# Levels of 255. Copies at JPEG's quality 40, at half the size or 5 % brighter stay within these; of 6,000 scenes of
# Emoji World no two do.
ROOT_MEAN_SQUARE, LARGEST_DIFFERENCE = 4.5, 24.0
OTHER_LIGHT, OTHER_CONTRAST = 30.0, 1.2


def thumbnail(picture: Image.Image) -> bytes:
    """Of an RGB picture: uint8 [16, 16, 3], the mean of each cell."""
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def _waves() -> np.ndarray:
    """Cosines of FREQUENCIES over the cells, of length 1 each: [frequencies, 16, 16]."""
    cells = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    lines = [np.cos(order * cells) / np.linalg.norm(np.cos(order * cells)) for order in range(3)]
    return np.stack([np.outer(lines[row], lines[column]) for row, column in FREQUENCIES])


WAVES = _waves().reshape(len(FREQUENCIES), -1)


def hash_values(content: bytes) -> np.ndarray:
    """A thumbnail's perceptual hash before it is rounded down: [7], in steps."""
    cells = np.frombuffer(content, np.uint8).reshape(-1, 3).astype(np.float32)
    cells -= cells.mean()
    cells *= NORMAL / max(cells.std(), FLATTEST)
    red, green, blue = cells.mean(axis=0)
    colours = COLOUR_SCALE * np.array([red - green, blue - (red + green) / 2])
    return np.append(WAVES @ cells.mean(axis=1), colours) / STEP


def neighbours(values: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The hash, and those across the borders that the values lie near to."""
    steps, places = np.floor(values).astype(int), values % 1
    choices = []
    for step, place in zip(steps.tolist(), places.tolist(), strict=True):
        choices.append((step, step - 1) if place < BORDER else (step, step + 1) if place > 1 - BORDER else (step,))
    return itertools.product(*choices)


def looks_like(thumbnails: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which of uint8 [n, 768] show what [768] shows, but for an even change of light: bool [n]."""
    cells, wanted = thumbnails.astype(np.float32), other.astype(np.float32)
    light, wanted_light = cells.mean(axis=1, keepdims=True), wanted.mean()
    cells, wanted = cells - light, wanted - wanted_light
    gain = (wanted.std() + 1e-3) / (cells.std(axis=1, keepdims=True) + 1e-3)
    difference = np.abs(cells * gain.clip(1 / OTHER_CONTRAST, OTHER_CONTRAST) - wanted)
    same = np.sqrt((difference**2).mean(axis=1)) <= ROOT_MEAN_SQUARE
    same &= difference.max(axis=1) <= LARGEST_DIFFERENCE
    return same & (np.abs(light[:, 0] - wanted_light) <= OTHER_LIGHT)


class Lookalikes:
    """Pictures by number, none of which looks like another; copies are compared with these, and not kept."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, ...], list[int]] = defaultdict(list)  # by perceptual hash: places in the lists
        self.numbers: list[int] = []
        self.thumbnails: list[bytes] = []

    def find(self, content: bytes) -> int | None:
        """The number of the first picture that a thumbnail's looks like."""
        places = sorted(place for cell in neighbours(hash_values(content)) for place in self.cells.get(cell, ()))
        if not places:
            return None
        known = np.frombuffer(b"".join(self.thumbnails[place] for place in places), np.uint8).reshape(len(places), -1)
        same = np.flatnonzero(looks_like(known, np.frombuffer(content, np.uint8)))
        return self.numbers[places[same[0]]] if len(same) else None

    def add(self, number: int, content: bytes) -> None:
        self.cells[tuple(np.floor(hash_values(content)).astype(int).tolist())].append(len(self.numbers))
        self.numbers.append(number)
        self.thumbnails.append(content)
