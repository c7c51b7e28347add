"""Does a CUDA machine train and answer as it should, and how fast? One command, 8 minutes at most.

    make gpu-check                                       all of it; or python scripts/gpu_check.py
    make gpu-check ARGS="--only steps decoding"          some of it
    python scripts/gpu_check.py --device cpu --tiny 1    does the command itself work? At toy sizes

Each check stands alone: one that fails says why and the others go on. docs/gpu.md tells how to read the report.
"""

import argparse
import gc
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from model.command_line import CommandLine
from model.device import choose_device, choose_dtype
from model.files import ROOT
from model.messages import UserError, counted
from scripts.measure import gpu_checks
from scripts.measure.gpu_checks import FULL, TINY, Check, Figures, Machine, Skipped, checks_of

TOTAL = 480  # seconds
LEAST = 3  # seconds left: with fewer no check begins
# Samples a second with cached features, 512 x 8, 196 + 60 tokens, that one of these cards should reach.
BARS, BAR_CARDS = {"stage 1": 5000, "stage 2": 4000}, ("H100", "H200")
COLUMNS = ("check", "setting", "samples/s", "MFU", "peak GB measured", "predicted", "result")


class TimeUp(BaseException):
    """Not an Exception, so that nothing that a check calls handles it as a failure of its own."""


@dataclass(frozen=True)
class Row:
    check: str
    setting: str
    result: str  # ok, failed: reason, skipped: why, or not run: out of time
    seconds: float
    figures: Figures

    @property
    def failed(self) -> bool:
        return self.result.startswith("failed")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp inside after so many seconds; not while the host is inside a call that never returns to Python."""

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_check(check: Check, machine: Machine) -> Row:
    started, left, figures = time.perf_counter(), machine.seconds_left(), Figures()
    try:
        if left < LEAST:
            raise TimeUp
        with time_limit(min(check.seconds, left)):
            figures = check.run(machine)
        result = "ok"
    except Skipped as reason:
        result = f"skipped: {reason}"
    except TimeUp:
        result = "not run: out of time"
        if left > check.seconds:
            result = f"failed: not done after the {check.seconds} s that it may take"
    except Exception as error:  # whatever it is, it is this check's result, and the others go on
        result = f"failed: {str(error).strip() or type(error).__name__}"
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
    return Row(check.name, check.setting, result, time.perf_counter() - started, figures)


def run_checks(checks: Sequence[Check], machine: Machine, seconds: float) -> list[Row]:
    """Run all of them, within so many seconds; print a line each."""
    rows, machine = [], replace(machine, ends=time.perf_counter() + seconds)
    for check in checks:
        row = run_check(check, machine)
        name, setting, speed, *_, result = cells_of(row)
        line = f"{f'{name} | {setting}':<58}{speed:>10} samples/s  {row.seconds:5.1f} s  {result[:150]}"
        print(line, flush=True)
        rows.append(row)
    return rows


def cells_of(row: Row) -> list[str]:
    figures = row.figures
    result = " ".join(row.result.split())  # a reason may have lines, a cell may not
    if figures.note:
        result += f"; {figures.note}"
    numbers = ((figures.samples_per_second, ",.1f"), (figures.mfu, ".1%"), (figures.peak_gb, ".3f"),
               (figures.predicted_gb, ".3f"))  # fmt: skip
    cells = ["-" if number is None else format(number, form) for number, form in numbers]
    return [row.check, row.setting, *cells, result.replace("|", "/")[:300]]


def bars_of(rows: Sequence[Row], card: str) -> list[str]:
    """A sentence a bar: the best of what was measured against it."""
    lines = []
    for stage, bar in BARS.items():
        measured = [row for row in rows if row.check == "steps" and row.setting.startswith(f"{stage}, 512 x 8, cached")]
        speeds = [row.figures.samples_per_second for row in measured if row.figures.samples_per_second]
        what = f"{stage}, 512 x 8, cached, 196 + 60 tokens: the bar for one H100 or H200 is {bar:,} samples/s"
        if not speeds:
            lines.append(f"{what}; not measured")
        elif not any(name in card for name in BAR_CARDS):
            lines.append(f"{what}; {max(speeds):,.0f} here, on another card")
        else:
            lines.append(f"{what}; {max(speeds):,.0f} here: {'reached' if max(speeds) >= bar else 'MISSED'}")
    return lines


def markdown(rows: Sequence[Row], facts: dict, bars: Sequence[str]) -> str:
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells_of, rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join(["# GPU check", "", about, "", *(f"- {bar}" for bar in bars), "", *lines]) + "\n"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", type=int, choices=(0, 1), default=0, help="1: toy sizes, figures that mean nothing")
    parser.add_argument("--ranks", type=int, default=0, help="most processes under torchrun; 0: one a GPU")
    parser.add_argument("--only", nargs="+", choices=gpu_checks.NAMES, default=list(gpu_checks.NAMES))
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all; what is left then is not run")
    parser.add_argument("--output", type=Path, default=ROOT / "out/gpu_check")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if a check failed."""
    options = parse_options(arguments)
    try:
        device = choose_device(options.device)
    except UserError as error:
        raise SystemExit(
            f"gpu_check: {error}, with --tiny 1: this machine can only show that the check works"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    scale, ranks = TINY if options.tiny else FULL, options.ranks or max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(device, choose_dtype("auto", device), scale, ranks, Path(folder))
        facts = machine.facts()
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        checks = [check for check in checks_of(machine) if check.name in options.only]
        rows = run_checks(checks, machine, options.seconds)
    bars = bars_of(rows, facts["card"])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.md").write_text(markdown(rows, facts, bars), encoding="utf-8")
    report = {"facts": facts, "bars": bars, "checks": [asdict(row) for row in rows]}
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    failed = sum(row.failed for row in rows)
    print("\n".join([*bars, f"{counted(len(rows), 'checks')}, {failed} failed; {options.output / 'report.md'}"]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
