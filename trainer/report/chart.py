"""A picture of lines over the steps of a run: panels below each other, one axis of steps, a table of last values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # drawn so many times as large and shrunk, which smoothes lines
WIDTH, LEFT, TABLE = 1040, 64, 290  # pixels: of all, left of the axes, right of them
TOP, HEIGHT, GAP, BOTTOM = 76, 300, 64, 48  # above the first panel, of a panel, between two, below the last
ROW = 19  # of the table
SMALL, BIG = 13, 17  # letters
INK, GREY, GRID = (40, 44, 52), (110, 116, 126), (228, 231, 236)
DASH, SPACE = 7, 5
MOST_DOTS = 40  # points of a line; more would run into each other
LOGARITHMIC = 20  # times the smallest value: a scale up to this one would flatten all that comes after the beginning

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    name: str
    points: Points  # (step, value), by step
    colour: Colour
    width: float = 2.5  # pixels
    dashed: bool = False
    dots: bool = False
    listed: bool = True  # in the table
    part: bool = False  # of the line above it there

    def at(self, step: int | None) -> float | None:
        return dict(self.points).get(step)


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    high: float | None = None  # the upper end of the scale, 0 being the lower; None: as the values want it
    note: str = ""  # below the table


def draw_chart(path: Path, title: str, panels: Sequence[Panel], best: int | None = None) -> None:
    """best: a step to mark, with what each line had there."""
    last = max(step for panel in panels for line in panel.lines for step, _ in line.points)
    height = TOP + len(panels) * (HEIGHT + GAP) - GAP + BOTTOM
    picture = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    pen = Pen(ImageDraw.Draw(picture))
    pen.text((LEFT, 24), title, INK, "lm", BIG)
    for number, panel in enumerate(panels):
        _PanelDrawing(pen, panel, TOP + number * (HEIGHT + GAP), last, best).draw(
            number == 0, number == len(panels) - 1
        )
    picture.reduce(SCALE).save(path)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers of 1, 2 or 5 times a power of ten within low and high, at most `most` + 1 of them."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / width - 1e-9)
    return [number * width for number in range(first, math.floor(high / width + 1e-9) + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within low and high; of more than three powers these alone."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for factor in factors if low <= (value := factor * 10.0**power) <= high]


def thinned(points: Points, most: int) -> Points:
    """Of more than 4 * `most` points the lowest and the highest of each of `most` equal parts: no peak is lost."""
    if len(points) <= 4 * most:
        return points
    size, kept = math.ceil(len(points) / most), []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


class Pen:
    """Draws in pixels of the picture as it will be, on one SCALE times as large."""

    def __init__(self, draw: ImageDraw.ImageDraw):
        self.on, self.fonts = draw, {size: ImageFont.load_default(size * SCALE) for size in (SMALL, BIG)}

    def text(self, at: tuple[float, float], text: str, colour: Colour, anchor: str, size: int = SMALL) -> None:
        self.on.text([part * SCALE for part in at], text, colour, self.fonts[size], anchor)

    def fitted(self, text: str, room: float) -> str:
        """As much of it as fits into so many pixels."""
        fits = self.fonts[SMALL].getlength
        while fits(text) > room * SCALE and len(text) > 1:
            text = text[:-3] + ".."
        return text

    def line(self, points: Points, colour: Colour, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.on.line(scaled, colour, round(width * SCALE), joint="curve")

    def dashes(self, points: Points, colour: Colour, width: float) -> None:
        """Along all of the points, so that short parts do not each begin with a dash."""
        gone = 0.0
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            length, place = math.hypot(x1 - x0, y1 - y0), 0.0
            while place < length:
                phase = (gone + place) % (DASH + SPACE)
                end = min(length, place + (DASH - phase if phase < DASH else DASH + SPACE - phase) + 1e-6)
                if phase < DASH:
                    ends = [(x0 + (x1 - x0) * part / length, y0 + (y1 - y0) * part / length) for part in (place, end)]
                    self.line(ends, colour, width)
                place = end
            gone += length

    def dot(self, x: float, y: float, colour: Colour, radius: float = 4) -> None:
        box = [(part + side * radius) * SCALE for side in (-1, 1) for part in (x, y)]
        self.on.ellipse(box, colour, "white", SCALE)


class _PanelDrawing:
    """One panel: its scale, its lines, and the table beside it."""

    def __init__(self, pen: Pen, panel: Panel, top: float, last: float, best: int | None):
        self.pen, self.panel, self.top, self.bottom = pen, panel, top, top + HEIGHT
        self.right, self.last, self.best = WIDTH - TABLE, max(last, 1), best
        values = [value for line in panel.lines for _, value in line.points]
        # The pale line of single values may dip deep for a moment: the scale is for the others.
        clear = [value for line in panel.lines if line.listed for _, value in line.points]
        self.logarithmic = panel.high is None and min(clear) > 0 and max(clear) > LOGARITHMIC * min(clear)
        self.low = min(clear) / 1.3 if self.logarithmic else 0.0
        self.high = panel.high or max(values) * (1.3 if self.logarithmic else 1.05) or 1.0

    def draw(self, is_first: bool, is_last: bool) -> None:
        self._axes(is_last)
        for line in sorted(self.panel.lines, key=lambda line: line.listed):  # pale ones below the others
            self._line(line)
        if self.best is not None and self.best <= self.last:
            self._mark(named=is_first)
        self._table()

    def place(self, step: float, value: float) -> tuple[float, float]:
        share = (value - self.low) / (self.high - self.low)
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return LEFT + (self.right - LEFT) * step / self.last, self.bottom - HEIGHT * max(0.0, min(1.0, share))

    def _axes(self, is_last: bool) -> None:
        title = self.panel.title + (", logarithmic" if self.logarithmic else "")
        self.pen.text((LEFT, self.top - 20), title, GREY, "lm")
        marks = logarithmic_ticks(self.low, self.high) if self.logarithmic else ticks(self.low, self.high, 6)
        for value in marks:
            _, y = self.place(0, value)
            self.pen.line([(LEFT, y), (self.right, y)], GRID, 1)
            self.pen.text((LEFT - 10, y), f"{value:.4g}", GREY, "rm")
        self.pen.line([(LEFT, self.bottom), (self.right, self.bottom)], GREY, 1)
        for step in ticks(0, self.last, 8):
            if step == int(step):
                x, _ = self.place(step, self.low)
                self.pen.line([(x, self.bottom), (x, self.bottom + 5)], GREY, 1)
                self.pen.text((x, self.bottom + 10), f"{int(step):,}", GREY, "mt")
        if is_last:
            self.pen.text((self.right, self.bottom + 28), "step", GREY, "rt")

    def _line(self, line: Line) -> None:
        placed = thinned([self.place(*point) for point in line.points], self.right - LEFT)
        if len(placed) > 1:
            (self.pen.dashes if line.dashed else self.pen.line)(placed, line.colour, line.width)
        if len(placed) == 1 or line.dots and len(placed) <= MOST_DOTS:
            for x, y in placed:
                self.pen.dot(x, y, line.colour, 1.5 + line.width)

    def _mark(self, named: bool) -> None:
        x, _ = self.place(self.best, self.low)
        self.pen.dashes([(x, self.top), (x, self.bottom)], GREY, 1)
        for line in self.panel.lines:
            if line.listed and (value := line.at(self.best)) is not None:
                self.pen.dot(*self.place(self.best, value), line.colour, 3 + line.width)
        if named:
            anchor = "rm" if x > (LEFT + self.right) / 2 else "lm"
            self.pen.text((x, self.top - 10), f"best: step {self.best:,}", INK, anchor)

    def _table(self) -> None:
        """Name and last value of each line; at the best step, too, where that is not the last."""
        name, last, best = self.right + 24, WIDTH - 66, WIDTH - 14
        both = self.best is not None and self.best < self.last
        if not both:
            last = best
        y = self.top - 20
        self.pen.text((last, y), "last", GREY, "rm")
        if both:
            self.pen.text((best, y), "best", GREY, "rm")
        for line in (line for line in self.panel.lines if line.listed):
            y += ROW
            stroke = self.pen.dashes if line.dashed else self.pen.line
            stroke([(name, y), (name + 19, y)], line.colour, line.width)
            x = name + (38 if line.part else 27)
            self.pen.text((x, y), self.pen.fitted(line.name, last - x - 45), INK, "lm")
            self.pen.text((last, y), f"{line.points[-1][1]:#.3g}", INK, "rm")
            if both and (value := line.at(self.best)) is not None:
                self.pen.text((best, y), f"{value:#.3g}", INK, "rm")
        if self.panel.note:
            self.pen.text((name, y + ROW + 4), self.panel.note, GREY, "lm")
