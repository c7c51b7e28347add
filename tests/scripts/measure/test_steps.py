"""The benchmark of steps: its table at toy sizes, and a device that does not exist."""

import json

import pytest

from helpers.models import VISION_SIZES
from model.config import VLMConfig
from scripts.measure import steps


def test_every_variant_is_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "VLMConfig", lambda **sizes: VLMConfig(**sizes, vision_config=VISION_SIZES))
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)  # compiling takes half a minute
    path = tmp_path / "found.json"
    steps.main(["--device", "cpu", "--parts", "stage1", "--batch_size", "2", "--rounds", "1", "--hidden_size", "32",
                "--layers", "1", "--json", str(path)])  # fmt: skip
    figures = json.loads(path.read_text())["stage1"]
    assert {"baseline", "no padding", "all, online", "all, cached"} <= set(figures["switches"])
    assert figures["cached"]["ratio"] == figures["cached"]["rows_per_second"] / figures["switches"]["baseline"]


@pytest.mark.parametrize("device", ["cuda:9x", "gpu"])
def test_a_device_that_does_not_exist_is_said_in_a_sentence(device):
    with pytest.raises(SystemExit, match=f"steps: --device {device}: "):
        steps.main(["--device", device])
