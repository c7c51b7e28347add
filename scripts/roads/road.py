"""What quickstart.py and realstart.py share: steps that are processes, and the minutes that they take."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from model.files import ROOT


class Road:
    """Runs each step as a process, as a user would, and keeps the minutes."""

    def __init__(self, name: str, output: Path):
        self.name, self.output, self.data, self.minutes = name, output, output / "data", {}

    def run(self, name: str, script: str, *arguments: object) -> None:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise SystemExit(f"{self.name}: {script} ended with code {code}; its message stands above")
        self.minutes[name] = round((time.perf_counter() - started) / 60, 2)

    def train(self, name: str, stage: str, data: str, *flags: object) -> Path:
        """Returns the file of weights."""
        self.run(name, f"trainer/train_{stage}.py", "--data_path", self.data / data, "--save_dir", self.output, *flags)
        (weight,) = self.output.glob(f"{stage}_[0-9]*[0-9].safetensors")
        return weight

    def effort(self) -> dict:
        """What it took, and with which versions."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        minutes = {"minutes": round(sum(self.minutes.values()), 2), "minutes_by_step": self.minutes}
        return {**minutes, "versions": versions}


def read_records(path: Path) -> list[dict]:
    """Of a file of JSON lines, which may hold any letter between two of them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
