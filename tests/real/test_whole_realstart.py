"""The second main road with a hundredth of its pictures: every step, as a user would."""

import json

import pytest

pytest.importorskip("gguf", reason="real weights are tried by make test-real")
pytest.importorskip("accelerate", reason="real weights are tried by make test-real")
pytest.importorskip("skimage", reason="real weights are tried by make test-real")
from PIL import Image

from scripts import realstart


def test_the_whole_road_in_small(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["realstart.py", "--output", str(tmp_path), "--scale", "0.01"])
    realstart.main()
    said = capfd.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["figures"]["all"]) == {"right", "shuffled", "none"}
    assert {"data", "stage 1", "stage 2", "score", "photographs"} <= set(report["minutes_by_step"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900
    assert "kind of thing" in said and "web_demo.py" in said
