"""How much faster several processes train than one: conversations a second of the real stage scripts under torchrun.

    python scripts/measure/ranks.py [--json FILE]

Every process computes on one thread and takes batches of the same size, so N of them would at best be N times as fast
as one. They read their data themselves (--num_workers 0), or a single process would use a second core for that. One
process and several alternate, so that a busy machine slows them alike; the medians over the log lines of all rounds
count, without the first two lines of a run.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from model.command_line import CommandLine
from model.messages import UserError
from scripts.measure.stage_runs import arguments_of, build_data, stage_metrics
from scripts.quickstart import BASE

SIZES = {  # flags of the stage script, and pictures of Emoji World to learn from
    "quickstart": ({"from_weight": BASE, "optimizer": "muon",
                    "learning_rate": 2e-3, "log_interval": 4}, 640),
    "26M": ({"from_weight": "none", "hidden_size": 512, "num_hidden_layers": 8, "log_interval": 1}, 144),
}  # fmt: skip


def measure(size: str, options: argparse.Namespace, folder: Path) -> dict:
    """{"conversations_per_second": {ranks: median}, "ratio": of the most processes to one}."""
    flags, pictures = SIZES[size]
    build_data(folder / "data", round(pictures * options.scale))
    flags = {**flags, "device": "cpu", "batch_size": 8, "num_workers": 0, "data_path": folder / "data/sft.jsonl"}
    speeds: dict[int, list[float]] = {1: [], options.ranks: []}
    medians: dict[int, float] = {}
    for number in range(options.rounds):
        for ranks in speeds:
            run = folder / f"round_{number}_{ranks}"
            lines = stage_metrics(options.stage, arguments_of(flags), run, ranks)
            speeds[ranks] += [line["conversations_per_second"] for line in lines]
            medians[ranks] = statistics.median(speeds[ranks])
            print(f"{size}, round {number + 1}, {ranks} x 1 thread: {medians[ranks]:.2f} conversations/s", flush=True)
    return {"conversations_per_second": medians, "ratio": medians[options.ranks] / medians[1]}


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stage", choices=("train_pretrain_vlm", "train_sft_vlm"), default="train_sft_vlm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data, for a quick look")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error(f"--ranks {options.ranks} must be at least 2: one process is measured beside them")
    result: dict = {"stage": options.stage, "torch": torch.__version__, "cores": os.cpu_count()}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result[size] = measure(size, options, Path(folder))
            except UserError as error:
                raise SystemExit(f"ranks: {error}") from error
        print(f"{size}: {options.ranks} processes train {result[size]['ratio']:.2f} x as fast as one")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
