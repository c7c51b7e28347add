"""curves.png: losses, and exact match in exams, over the steps of a run, drawn from metrics.jsonl."""

import json
import math
from itertools import accumulate, cycle
from pathlib import Path

from trainer.report.chart import INK, Line, Panel, Points, draw_chart

TRAINING, PALE, VALIDATION = (31, 105, 200), (186, 209, 240), (225, 100, 20)
MEAN, BOLD = (150, 154, 162), 3
COLOURS = (  # that people who see red as green tell apart, too
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (127, 60, 141),
    (128, 96, 60),
)  # fmt: skip
FEW = 20  # values; more are smoothed over so many parts of the run
MOST_ROWS = 16  # lines of exams that can still be told apart, and that the table beside them has room for
EXAM = "exam"


def draw_curves(metrics: Path, path: Path, title: str, best: int | None = None) -> bool:
    """Draw what stands in metrics.jsonl; False where that is nothing. best: the step of the weights that were kept."""
    curves = read_curves(metrics)
    panels = [panel for panel in (_losses(curves), _exams(curves)) if panel.lines]
    if panels:
        draw_chart(path, title, panels, best)
    return bool(panels)


def read_curves(metrics: Path) -> dict[str, Points]:
    """(step, value) of loss, val_loss and all of exams, by name; what is no number is left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            wanted = name in ("loss", "val_loss") or name.split("/")[0] == EXAM
            if wanted and value is not None and math.isfinite(value):
                curves.setdefault(name, []).append((record["step"], value))
    return curves


def smoothed(points: Points) -> Points:
    """Means over a twentieth of the points around each, of fewer at the beginning, where values fall fast; few of
    them stay as they are."""
    reach = len(points) // (2 * FEW)
    sums = [0.0, *accumulate(value for _, value in points)]
    found = []
    for number, (step, _) in enumerate(points):
        within = min(number, reach)
        first, end = number - within, min(len(points), number + within + 1)
        found.append((step, (sums[end] - sums[first]) / (end - first)))
    return found


def _losses(curves: dict[str, Points]) -> Panel:
    training, validation = curves.get("loss", ()), curves.get("val_loss", ())
    single = Line("training, each line of the log", training, PALE, 1.5, listed=False)
    lines = [
        *([single] if len(training) >= 2 * FEW else []),
        Line("training", smoothed(training), TRAINING),
        Line("validation", validation, VALIDATION, dots=True),
    ]
    return Panel("loss a trained token", [line for line in lines if line.points])


def _exams(curves: dict[str, Points]) -> Panel:
    """Bold lines, the second dashed; thin ones for their kinds, which have the same colour in both exams."""
    names = [name for name in curves if name.count("/") == 1]
    kinds = [name for name in curves if name.count("/") == 2]
    mean = [Line("mean", curves[EXAM], MEAN, BOLD)] if len(names) > 1 else []
    if len(names) > 2 or len(mean) + len(names) + len(kinds) > MOST_ROWS:
        shown = zip(names[: MOST_ROWS - 1], cycle(COLOURS), strict=False)
        lines = [*mean, *(Line(name.split("/", 1)[1], curves[name], colour, dots=True) for name, colour in shown)]
        return Panel("exact match in exams", lines, high=1.0, note="each kind: metrics.jsonl" if kinds else "")
    colours = dict(zip(dict.fromkeys(map(_kind, kinds)), cycle(COLOURS), strict=False))
    lines = mean
    for exam, dashed in zip(names, (False, True), strict=False):
        lines.append(Line(exam.split("/", 1)[1], curves[exam], INK, BOLD, dashed, dots=True))
        of_exam = [name for name in kinds if name.startswith(f"{exam}/")]
        for name in sorted(of_exam, key=lambda name: -curves[name][-1][1]):  # as they end at the right
            lines.append(Line(_kind(name), curves[name], colours[_kind(name)], 1.5, dashed, dots=True, part=True))
    return Panel("exact match in exams", lines, high=1.0)


def _kind(name: str) -> str:
    return name.split("/", 2)[2]
