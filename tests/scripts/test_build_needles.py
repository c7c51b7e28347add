"""The files of build_needles.py are what the stages and the exam read."""

import json
from pathlib import Path

import pytest

from dataset.readers.opening import open_data
from scripts import build_needles


@pytest.fixture
def build(monkeypatch, tmp_path):
    def run(*flags: str) -> dict[str, list[dict]]:
        monkeypatch.setattr("sys.argv", ["build_needles.py", "--output", str(tmp_path), *flags])
        build_needles.main()
        return {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in tmp_path.glob("*.jsonl")}

    return run


def test_texts_to_train_on_and_held_out(build, tmp_path):
    found = build("--lengths", "240", "400", "--train", "16", "--held_out", "2", "--questions", "5", "--series", "0")
    assert set(found) == {"needles", "held_out"} and len(found["needles"]) == 16
    read, asked = ([line for line in found["needles"] if key in line] for key in ("text", "conversations"))
    assert len(read) == 2 and {len(line["conversations"]) for line in asked} == {10}
    held = found["held_out"]
    assert [line["length"] for line in held] == [240] * 20 + [400] * 20
    assert [round(line["depth"], 1) for line in held[20:30]] == sorted(round(line["depth"], 1) for line in held[20:30])
    for line in held:
        question, answer = line["conversations"]
        assert question["content"].count(answer["content"]) == 1
    assert len(open_data(tmp_path / "needles.jsonl")) == 16 and not (tmp_path / "images").exists()


def test_a_share_of_the_texts_is_series_to_be_said_again(build):
    lines = build("--lengths", "100", "--train", "40", "--series", "0.5")["needles"]
    again = [line for line in lines if "Say it again from" in str(line)]
    assert 10 < len(again) < 30
    assert all("password" in str(line) for line in lines if line not in again and "text" not in line)
    assert build("--lengths", "100", "--train", "40", "--series", "1")["needles"][0]["conversations"]
    assert "password" not in str(build("--lengths", "100", "--train", "40", "--series", "1"))


def test_rows_of_pictures(build, tmp_path):
    found = build("--train", "0", "--pictures", "2", "--held_out_pictures", "1", "--most_pictures", "4")
    assert set(found) == {"pictures", "held_out_pictures"} and len(found["held_out_pictures"]) == 10
    for name in found:
        for sample in open_data(tmp_path / f"{name}.jsonl"):
            assert len(sample.open_pictures()) == sample.messages[0]["content"].count("<image>") <= 4
    assert "CC BY-SA" in (tmp_path / "LICENSE.txt").read_text()


@pytest.mark.parametrize(
    "flags",
    [["--lengths", "60"], ["--lengths", "100", "--held_out", "1"], ["--most_pictures", "41"], ["--series", "2"]],
    ids=" ".join,
)
def test_what_cannot_be_is_refused_before_anything_is_written(build, flags, capsys, tmp_path):
    with pytest.raises(SystemExit):
        build(*flags)
    assert flags[0] in capsys.readouterr().err and not list(Path(tmp_path).iterdir())
