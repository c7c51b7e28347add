"""Each data format, from the command line to weights: twenty steps of the real stage script."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from helpers.faults import start_child, wait_for
from helpers.formats import WRITERS, images_path
from helpers.learnt import captioned
from helpers.models import SIZES
from helpers.repository import ROOT
from model.weights import read_weights

STEPS = 20


def train(script: str, folder: Path, *flags: object) -> str:
    """Run a stage script with these flags; what it said."""
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    fixed = ["--save_dir", folder / "out", "--from_weight", "none", "--device", "cpu", "--dtype", "float32"]
    steps = ["--batch_size", 2, "--max_seq_len", 64, "--num_workers", 0, "--log_interval", STEPS, "--val_samples", 0]
    arguments = [script, *sizes, *map(str, (*fixed, *steps, *flags))]

    def run() -> None:
        sys.argv = arguments
        runpy.run_path(str(ROOT / script), run_name="__main__")

    log = folder / "log"
    assert wait_for([start_child(run, log)]) == [0], log.read_text()
    return log.read_text()


@pytest.mark.parametrize("writer", WRITERS)
def test_twenty_steps_of_every_format(writer, tmp_path, tower_folder):
    write, recognised = WRITERS[writer]
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data", captioned(2 * STEPS))
    flags = ["--data_path", path, "--vision_model", tower_folder]
    if place := images_path(writer, tmp_path / "data"):
        flags += ["--images_path", place]
    said = train("trainer/train_sft_vlm.py", tmp_path, *flags)
    assert f": {recognised} in " in said
    metrics = [json.loads(line) for line in next(tmp_path.glob("out/*/metrics.jsonl")).read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record][-1] == STEPS
    (weights,) = (tmp_path / "out").glob("sft_vlm_*.safetensors")
    assert read_weights(weights)[1]


def test_twenty_steps_of_plain_text(tmp_path):
    paragraphs = [f"There are {number} cats\nand a dog." for number in range(2 * STEPS)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    said = train("trainer/train_llm.py", tmp_path, "--data_path", tmp_path / "book.txt")
    assert f"text in paragraphs, {2 * STEPS} records" in said
    assert list((tmp_path / "out").glob("llm_*.safetensors"))
