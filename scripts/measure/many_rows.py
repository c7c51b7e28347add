"""The memory and the start of a run over a million rows: the real stage script as a process, watched from outside.

    python scripts/measure/many_rows.py [--kind parquet|jsonl] [--rows 1000000] [--folder DIR] [--json FILE]

A parquet with a picture of its own in every row, or a JSONL whose rows share a few hundred files. The stage starts
cold, which checks and copies everything, and ends at the first step; then warm, for --steps steps. Memory is the PSS of
all its processes together (/proc/PID/smaps_rollup: what several share counts once), looked at four times a second.
`own` is what of it is no file's: mapped files count too, but the system takes their pages back whenever it needs them.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from model.progress import progress_over
from scripts.measure.stage_runs import PATIENCE, arguments_of, child_environment
from scripts.quickstart import TOWER

PICTURES, SIDE = 500, 16  # of the pictures that are drawn: how many, and pixels a side
AT_ONCE = 10_000  # rows made together
EVERY = 0.25  # seconds between two looks
SETTLED = 0.1  # of the steps, before memory must be flat
SMALL = {"from_weight": "none", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip  # the decoder's
KILO = 1024  # bytes of the kernel's kB


class Memory(NamedTuple):
    """MB of all processes of a run."""

    whole: float = 0.0
    own: float = 0.0  # not of a file


class Look(NamedTuple):
    seconds: float  # since the start of the process
    step: int  # the last that is done
    memory: Memory


# ---- rows


def pictures() -> list[bytes]:
    """Small pictures of noise, as PNG."""
    generator, found = np.random.default_rng(0), []
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def turns(row: int) -> list[dict]:
    words = " ".join(["a small picture"] * (1 + row % 7))
    return [
        {"role": "user", "content": f"<image>\nWhat is number {row}?"},
        {"role": "assistant", "content": f"It is {words}."},
    ]


def chunks(rows: int) -> Iterator[range]:
    starts = range(0, rows, AT_ONCE)
    return (range(start, min(rows, start + AT_ONCE)) for start in progress_over(starts, "making rows", f"x{AT_ONCE}"))


def make_parquet(path: Path, rows: int) -> None:
    """Every picture is there once: what follows a PNG's end makes it another."""
    drawn = pictures()
    schema = pyarrow.schema([("conversations", pyarrow.string()), ("image_bytes", pyarrow.binary())])
    with parquet.ParquetWriter(path, schema) as writer:
        for chunk in chunks(rows):
            texts = pyarrow.array([json.dumps(turns(row)) for row in chunk])
            contents = pyarrow.array([drawn[row % PICTURES] + row.to_bytes(8, "little") for row in chunk])
            writer.write_batch(pyarrow.record_batch([texts, contents], schema=schema))


def make_lines(path: Path, rows: int) -> None:
    """Beside the pictures that they show."""
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for number, content in enumerate(pictures()):
        (images / f"{number}.png").write_bytes(content)
    with path.open("w") as file:
        for chunk in chunks(rows):
            lines = ({"image": f"{row % PICTURES}.png", "conversations": turns(row)} for row in chunk)
            file.writelines(json.dumps(line) + "\n" for line in lines)


KINDS = {"parquet": make_parquet, "jsonl": make_lines}


# ---- watching a process


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has ended since
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def memory_of(process: int) -> Memory:
    """Of a process and its descendants."""
    whole = own = 0
    for one in family(process):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended since
        values = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
        whole += values.get("Pss", 0)
        own += values.get("Pss_Anon", 0) + values.get("Pss_Shmem", 0)
    return Memory(whole * KILO / 1e6, own * KILO / 1e6)


def last_step(metrics: Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = [line for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    return json.loads(lines[-1])["step"] if lines else 0


def watched_run(command: Sequence, folder: Path, steps: int) -> list[Look]:
    """Start a stage and look at it until it has done so many steps. Raises UserError where it ends before."""
    log, looks = folder / "output.txt", []
    for metrics in folder.glob("*/metrics.jsonl"):
        metrics.unlink()  # of the run before
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=child_environment(1),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        step = 0
        while step < steps:
            if process.poll() is not None:
                raise UserError(f"the run ended with code {process.returncode}:\n{log.read_text()[-2000:].strip()}")
            memory = memory_of(process.pid)
            step = max((last_step(path) for path in folder.glob("*/metrics.jsonl")), default=0)
            looks.append(Look(time.monotonic() - started, step, memory))
            time.sleep(EVERY)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return looks


def growth(looks: Sequence[Look], part: str) -> float:
    """MB that a part of Memory grows by in 1,000 steps, by a line through all looks once the run has settled."""
    last = looks[-1].step
    settled = [look for look in looks if look.step >= max(1, SETTLED * last)]
    if len(settled) < 2:
        return 0.0
    steps, values = [look.step for look in settled], [getattr(look.memory, part) for look in settled]
    return float(np.polyfit(steps, values, 1)[0]) * 1000


def figures(looks: Sequence[Look]) -> dict[str, float]:
    """first_step: seconds from the start of the process; MB at their peak before and after it, all and own."""
    first = next(number for number, look in enumerate(looks) if look.step)
    found = {"first_step_seconds": looks[first].seconds}
    for name, part in (("starting", looks[: first + 1]), ("training", looks[first:])):
        found[f"{name}_peak_mb"] = max(look.memory.whole for look in part)
        found[f"{name}_own_peak_mb"] = max(look.memory.own for look in part)
    if looks[-1].step > looks[first].step:
        found["growth_mb_per_1000_steps"] = growth(looks, "whole")
        found["own_growth_mb_per_1000_steps"] = growth(looks, "own")
    return {name: round(value, 1) for name, value in found.items()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    folder.mkdir(parents=True, exist_ok=True)
    data, run = folder / f"rows.{options.kind}", folder / "out"
    run.mkdir(exist_ok=True)
    KINDS[options.kind](data, options.rows)
    flags = {
        "data_path": data, "save_dir": run, "vision_model": TOWER, "num_workers": options.workers,
        "batch_size": options.batch_size, "device": options.device, "log_interval": 1, "save_interval": 1_000_000,
        **SMALL,
    }  # fmt: skip
    command = [sys.executable, ROOT / "trainer/train_pretrain_vlm.py", *arguments_of(flags)]
    result = {}
    for name, steps in (("cold", 1), ("warm", options.steps)):
        result[name] = figures(watched_run(command, run, steps))
        print(f"{options.kind}, {options.rows:,} rows, {name}:", json.dumps(result[name]), flush=True)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--kind", choices=KINDS, default="parquet")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="processes that decode pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where rows and run lie, and stay; empty: a temporary one")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            result = measure(options, options.folder or Path(temporary))
        except UserError as error:
            raise SystemExit(f"many_rows: {error}") from error
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "folder")}
        options.json.write_text(json.dumps({"settings": settings, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
