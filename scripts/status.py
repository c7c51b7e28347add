"""What a run is doing, how it ended, and its loss as a curve in the terminal.

python scripts/status.py out/sft_vlm_512            one run
python scripts/status.py                            every run in out/
"""

import argparse
import json
import math
import time
from pathlib import Path

from model.command_line import CommandLine
from model.files import ROOT
from model.messages import counted, did_you_mean, plain
from model.process_lock import is_held

BARS = " ▁▂▃▄▅▆▇█"  # by the eighths of a line that are filled
FULL = len(BARS) - 1
HEIGHT = 8  # lines of the curve


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folders", nargs="*", default=[str(ROOT / "out")], help="runs, or folders that hold runs")
    parser.add_argument("--width", type=int, default=72, help="columns of the loss curve")
    parser.add_argument("--watch", type=float, default=0, help="seconds after which to print again; 0: once")
    options = parser.parse_args(arguments)
    while True:
        runs = [run for folder in options.folders for run in runs_in(Path(folder))]
        if not runs:
            cure = did_you_mean(options.folders[0]) or ": name a run folder, such as out/sft_vlm_512"
            raise SystemExit(f"no status.json in {', '.join(options.folders)}{cure}")
        print("\n\n".join(describe(run, options.width) for run in runs), flush=True)
        if not options.watch:
            return
        time.sleep(options.watch)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, or the runs right inside it, the latest last."""
    files = [folder / "status.json"] if (folder / "status.json").is_file() else folder.glob("*/status.json")
    return [path.parent for path in sorted(files, key=lambda path: path.stat().st_mtime)]


def describe(run: Path, width: int) -> str:
    """A run in a few lines: state, progress, last checkpoint, the loss."""
    try:
        status = json.loads((run / "status.json").read_text())
    except (OSError, ValueError) as error:
        return f"{run}: status.json cannot be read ({error})"
    state = status["state"]
    if state == "running" and not is_held(run / "lock"):
        state = "killed (nothing holds the folder any more): --from_resume 1 goes on from the last checkpoint"
    total = f"/{status['total_steps']}" if status["total_steps"] else ""
    lines = [
        f"{run}: {state}",
        f"  step {status['step']}{total}, epoch {status['epoch']:.2f}, {status['samples_seen']:,} rows seen, "
        f"{status['samples_skipped']:,} skipped in {counted(status['steps_skipped'], 'steps')}",
        f"  last checkpoint: {status['last_checkpoint'] or 'none of this start'}",
        f"  {counted(status['ranks'], 'ranks')}, process {status['pid']} on {status['host']}, "
        f"updated {ago(status['updated'])} ago, restarts: {status['restarts']}",
    ]
    left_out = {name: status.get(f"samples_{name}") or 0 for name in ("bad", "dropped", "damaged")}
    if any(left_out.values()):
        counts = ", ".join(f"{count:,} {name}" for name, count in left_out.items())
        lines.append(f"  left out: {counts}; {run / 'quarantine.jsonl'} names them")
    if status["reason"]:
        lines.append(f"  reason: {plain(status['reason'])}")
    if exams := status.get("exams"):
        each = ", ".join(
            f"{name} {mark['exact_match']:.3f} ({mark['interval'][0]:.2f} to {mark['interval'][1]:.2f})"
            for name, mark in exams["each"].items()
        )
        lines.append(f"  exams of step {exams['step']}: {exams['mean']:.3f}; {each}")
    steps, losses = losses_of(run / "metrics.jsonl")
    if losses:
        lines += ["", *curve(steps, losses, width)]
    return "\n".join(lines)


def losses_of(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of the log; a last line that is being written is left out, and what older versions wrote NaN."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    records = [record for record in records if record.get("loss") is not None and math.isfinite(record["loss"])]
    return [record["step"] for record in records], [record["loss"] for record in records]


def curve(steps: list[int], losses: list[float], width: int) -> list[str]:
    """The losses as HEIGHT lines of text, each column the mean of some steps in a row; from 0 to the largest."""
    columns = min(width, len(losses))
    edges = [len(losses) * n // columns for n in range(columns + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    top = max(means) or 1.0
    eighths = [round(mean / top * HEIGHT * FULL) for mean in means]
    lines = []
    for row in reversed(range(HEIGHT)):
        bars = "".join(BARS[min(max(height - row * FULL, 0), FULL)] for height in eighths)
        lines.append(f"{top * (row + 1) / HEIGHT:8.3f} {bars.rstrip()}")
    summary = f"{losses[0]:.3f} to {losses[-1]:.3f}, lowest {min(losses):.3f}"
    return [*lines, f"{'loss':>8} step {steps[0]} to {steps[-1]}: {summary}"]


def ago(then: float) -> str:
    seconds = max(0, time.time() - then)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


if __name__ == "__main__":
    main()
