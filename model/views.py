"""What the tower sees of a picture: all of it at once, and where it is cut, its tiles, each in the tower's own size.

A view is one square of the tower's size, one span of placeholders, and a heading, the text before the span: "whole:"
for all of the picture, "1,2:" for the tile in row 1 and column 2. A picture that is not cut is one view without a
heading. A video is a view a frame, under the time at which it is shown: "0:03". The idea is LLaVA-NeXT's and nanoVLM's;
places and times are said in ordinary tokens, so that any base can read them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from model.config import BICUBIC

MAX_TILES = 100
FRAMES, MAX_FRAMES = 8, 256  # of a video that are seen: by default, and at most
WHOLE = "whole:"
BEYOND = (128, 128, 128)  # what fills tiles beyond the picture's edges


class Grid(NamedTuple):
    """How a picture is cut: tiles of one size that cover it, scaled alike in both directions, from the upper left."""

    rows: int
    columns: int
    width: int  # pixels of the scaled picture; what is beyond it in the last row and column is filled
    height: int

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the picture's views, in order."""
        if self == UNCUT:
            return ("",)
        return (WHOLE, *(f"{row + 1},{column + 1}:" for row in range(self.rows) for column in range(self.columns)))


UNCUT = Grid(1, 1, 0, 0)


class Times(NamedTuple):
    """How a video is cut: the labels of its frames' times, in order."""

    headings: tuple[str, ...]


class Frames(NamedTuple):
    """A video as it is looked at, which stands wherever a picture may."""

    pictures: Sequence[Image.Image]  # RGB, of one size
    times: Times

    def strip(self, side: int) -> Image.Image:
        """All of them in one row, for people. side: pixels of the longer side of each, at most."""
        small = [picture.copy() for picture in self.pictures]
        for picture in small:
            picture.thumbnail((side, side))
        width, height = small[0].size
        row = Image.new("RGB", (width * len(small), height))
        for place, picture in enumerate(small):
            row.paste(picture.resize((width, height)), (place * width, 0))
        return row


Cut = Grid | Times


class Sight(NamedTuple):
    """How a model takes in a picture."""

    side: int  # pixels of a view, which is square
    resample: int = BICUBIC  # Pillow's number of the filter by which pictures are scaled
    tiles: int = 0  # into which a picture is cut at most; 0: into none
    frames: int = FRAMES  # of a video, at most

    def cut(self, picture: Image.Image | Frames) -> Cut:
        """How this one is cut into views."""
        return picture.times if isinstance(picture, Frames) else self.grid(*picture.size)

    def grid(self, width: int, height: int) -> Grid:
        """The grid of at most so many tiles that shows the most of a picture of these pixels.

        That is the one in which it keeps the most of them; of several the one with the fewest tiles. A picture that is
        no larger than one tile is not cut.
        """
        if not self.tiles or max(width, height) <= self.side:
            return UNCUT
        counts = [(rows, columns) for rows in range(1, self.tiles + 1) for columns in range(1, self.tiles // rows + 1)]
        grids = [self._filled(*count, width, height) for count in counts]
        best = max(grids, key=lambda g: (min(g.width, width) * min(g.height, height), -g.rows * g.columns))
        return UNCUT if best.rows * best.columns == 1 else best

    def _filled(self, rows: int, columns: int, width: int, height: int) -> Grid:
        """With a picture of this shape as large in it as it can be."""
        scale = min(rows * self.side / height, columns * self.side / width)
        return Grid(rows, columns, max(1, round(width * scale)), max(1, round(height * scale)))

    def views(self, picture: Image.Image | Frames, grid: Cut) -> list[Image.Image]:
        """RGB squares, one for each of the headings."""
        if isinstance(picture, Frames):
            return [self.square(frame) for frame in picture.pictures]
        whole = self.square(picture)
        if grid == UNCUT:
            return [whole]
        canvas = Image.new("RGB", (grid.columns * self.side, grid.rows * self.side), BEYOND)
        canvas.paste(self._scaled(picture, grid.width, grid.height))
        corners = [(column * self.side, row * self.side) for row in range(grid.rows) for column in range(grid.columns)]
        return [whole, *(canvas.crop((x, y, x + self.side, y + self.side)) for x, y in corners)]

    def reduced(self, picture: Image.Image | Frames) -> Image.Image | Frames:
        """As much of a picture as its views need, for whoever keeps it until they are asked for."""
        if isinstance(picture, Frames):
            return picture._replace(pictures=self.views(picture, picture.times))
        grid = self.grid(*picture.size)
        if not self.tiles:
            return self.square(picture)
        if grid == UNCUT or picture.width <= grid.width:
            return picture
        return self._scaled(picture, grid.width, grid.height)

    def square(self, picture: Image.Image) -> Image.Image:
        """The whole picture, squeezed: nothing is cut off."""
        return self._scaled(picture, self.side, self.side)

    def _scaled(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        return picture.resize((width, height), Image.Resampling(self.resample))
