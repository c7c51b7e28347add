"""loss.png: training and validation loss over the steps, drawn from metrics.jsonl."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 900, 520, 2  # pixels; drawn SCALE times as large and shrunk, which smoothes lines
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 56, 54  # around the axes
INK, GREY, GRID = (40, 44, 52), (120, 126, 136), (228, 231, 236)
TRAINING, PALE, VALIDATION = (31, 105, 200), (176, 204, 240), (225, 100, 20)
FEW = 20  # values; more are smoothed over so many parts of the run
Points = Sequence[tuple[float, float]]


def read_losses(metrics: Path) -> tuple[Points, Points]:
    """(step, loss) of the training log and of the validations; what is no number is left out."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return tuple(
        [(r["step"], r[name]) for r in records if r.get(name) is not None and math.isfinite(r[name])]
        for name in ("loss", "val_loss")
    )


def draw_losses(metrics: Path, path: Path, title: str) -> bool:
    """Draw them; False where there is no value to draw."""
    training, validation = read_losses(metrics)
    if not training and not validation:
        return False
    chart = _Chart([*training, *validation], title)
    if len(training) > FEW:
        chart.line(training, PALE, 1.5)
    chart.line(smoothed(training), TRAINING, 2.5)
    chart.line(validation, VALIDATION, 2.5, dots=True)
    chart.legend([("training", TRAINING, training), ("validation", VALIDATION, validation)])
    chart.save(path)
    return True


def smoothed(points: Points) -> Points:
    """An exponential mean over a twentieth of the points; few of them stay as they are."""
    kept = max(0.0, 1 - FEW / max(1, len(points)))
    mean, weight, found = 0.0, 0.0, []
    for step, value in points:
        mean, weight = kept * mean + (1 - kept) * value, kept * weight + 1 - kept
        found.append((step, mean / weight))  # the weight corrects for the short memory of the beginning
    return found


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers of 1, 2 or 5 times a power of ten within low and high, at most `most` + 1 of them."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / width - 1e-9)
    return [number * width for number in range(first, math.floor(high / width + 1e-9) + 1)]


class _Chart:
    """Axes with numbers, and lines in them."""

    def __init__(self, points: Points, title: str):
        steps, values = zip(*points, strict=True)
        self.first, self.last = 0, max(max(steps), 1)
        self.low, self.high = 0.0, max(values) * 1.05 or 1.0
        self.picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.font, self.bold = (ImageFont.load_default(size * SCALE) for size in (13, 16))
        self._axes(title)

    def place(self, step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / (self.last - self.first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)
        return x * SCALE, y * SCALE

    def line(self, points: Points, colour: tuple[int, int, int], width: float, dots: bool = False) -> None:
        placed = [self.place(*point) for point in points]
        if len(placed) > 1:
            self.draw.line(placed, colour, round(width * SCALE), joint="curve")
        radius = 4 * SCALE
        for x, y in placed if dots or len(placed) == 1 else ():
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, "white", SCALE)

    def legend(self, entries: Sequence[tuple[str, tuple[int, int, int], Points]]) -> None:
        """Name and last value of each line that there is, at the top right."""
        x, y = (WIDTH - RIGHT) * SCALE, 22 * SCALE
        for name, colour, points in reversed([entry for entry in entries if entry[2]]):
            text = f"{name} {points[-1][1]:.3g}"
            x -= self.draw.textlength(text, self.font)
            self.draw.text((x, y), text, INK, self.font, anchor="lm")
            self.draw.line((x - 30 * SCALE, y, x - 8 * SCALE, y), colour, 3 * SCALE)
            x -= 52 * SCALE

    def save(self, path: Path) -> None:
        self.picture.reduce(SCALE).save(path)

    def _axes(self, title: str) -> None:
        left, bottom = self.place(self.first, self.low)
        right, _ = self.place(self.last, self.low)
        for value in ticks(self.low, self.high, 6):
            _, y = self.place(self.first, value)
            self.draw.line((left, y, right, y), GRID, SCALE)
            self.draw.text((left - 10 * SCALE, y), f"{value:.4g}", GREY, self.font, anchor="rm")
        for step in ticks(self.first, self.last, 8):
            x, _ = self.place(step, self.low)
            if step == int(step):
                self.draw.line((x, bottom, x, bottom + 5 * SCALE), GREY, SCALE)
                self.draw.text((x, bottom + 10 * SCALE), f"{int(step):,}", GREY, self.font, anchor="mt")
        self.draw.line((left, bottom, right, bottom), GREY, SCALE)
        self.draw.text((left, 22 * SCALE), title, INK, self.bold, anchor="lm")
        self.draw.text((right, bottom + 30 * SCALE), "step", GREY, self.font, anchor="rt")
