"""What a stage leaves behind: commands that work as they are printed; what a score leaves: a sheet."""

import dataclasses
import re
import shlex
from pathlib import Path

from PIL import Image

import eval_vlm
from dataset.box_drawing import COLOURS
from dataset.readers.opening import read_samples
from helpers.models import SIZES
from helpers.repository import ROOT
from helpers.runs import tiny, write_texts
from scripts.assets import sheet
from trainer.config import StageConfig, parse_config
from trainer.report.next_steps import next_steps
from trainer.stage import run_stage
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM


def commands(said: str) -> dict[str, list[str]]:
    """By its first word, each command of a stage's end in parts, from the script on."""
    lines = said.splitlines()
    return {line.split(":")[0]: shlex.split(line.split(":", 1)[1])[1:] for line in lines if ".py " in line}


def config_of(stage: StageConfig, parts: list[str]) -> StageConfig:
    assert (ROOT / parts[0]).resolve() == ROOT / f"trainer/train_{stage.name}.py"
    return parse_config(stage, parts[1:])


def test_every_stage_prints_the_next_and_the_last_how_to_ask(data_folder, tower_folder, capsys, monkeypatch):
    monkeypatch.chdir(data_folder)
    (data_folder / "train.jsonl").rename(data_folder / "pretrain.jsonl")
    texts = str(write_texts(data_folder))
    run_stage(tiny(LLM, data_folder, tower_folder, data_path=texts))
    following = config_of(PRETRAIN_VLM, commands(capsys.readouterr().out)["next"])
    assert Path(following.data_path).resolve() == data_folder / "pretrain.jsonl"
    quick = {"vision_model": str(tower_folder), "device": "cpu", "dtype": "float32", "num_workers": 0}
    run_stage(dataclasses.replace(following, **quick))
    following = config_of(SFT_VLM, commands(capsys.readouterr().out)["next"])
    assert Path(following.data_path).name == "pretrain.jsonl" and following.vision_model == str(tower_folder)
    run_stage(dataclasses.replace(following, **quick))
    printed = commands(capsys.readouterr().out)
    assert printed["chat"][-2:] == ["--", "out"] and (ROOT / printed["chat"][3]).is_file()
    monkeypatch.setattr("sys.argv", [*printed["ask"], "--device", "cpu", "--max_new_tokens", "3"])
    eval_vlm.main()
    number = re.search(r"images/(\d+)_0.png", " ".join(printed["ask"]))[1]  # of the first that was not held back
    assert f"What is number {number}?" in printed["ask"]


def test_held_out_lines_beside_the_data_are_scored_with_a_sheet(data_folder, tower_folder):
    config = tiny(SFT_VLM, data_folder, tower_folder)
    example = read_samples(config.data_path)[0]
    assert "held_out.jsonl, then scripts/score.py" in next_steps(config, example)
    examined = dataclasses.replace(config, eval_tasks=f"{data_folder / 'train.jsonl'}:2,b.jsonl")
    assert str(data_folder / "train.jsonl") in commands(next_steps(examined, None))["score"]  # the only one there is
    (data_folder / "held_out.jsonl").write_bytes(Path(config.data_path).read_bytes())
    parts = commands(next_steps(config, example))["score"]
    assert parts[3:] == ["--data", str(data_folder / "held_out.jsonl"), "--sheet", str(config.run_dir / "sheet.png")]
    examined = dataclasses.replace(config, eval_tasks=f"{data_folder / 'exam.jsonl'}:2,b.jsonl")
    assert commands(next_steps(examined, None))["score"] == parts  # what was held out, also from choosing the weights
    other = dataclasses.replace(config, val_path=str(data_folder / "train.jsonl"))
    assert str(data_folder / "train.jsonl") in commands(next_steps(other, None))["score"]


def test_pictures_of_the_next_stage_lie_where_these_lay(data_folder, tower_folder):
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, images_path=str(data_folder / "images"), **SIZES)
    assert config_of(SFT_VLM, commands(next_steps(config, None))["next"]).images_path == config.images_path
    config = tiny(SFT_VLM, data_folder, tower_folder, images_path="elsewhere", data_format="llava", **SIZES)
    (data_folder / "held_out.jsonl").write_text("")
    parts = commands(next_steps(config, None))["score"]
    assert [parts[parts.index(flag) + 1] for flag in ("--images_path", "--data_format")] == ["elsewhere", "llava"]


# the sheet


def test_a_sheet_shows_pictures_of_any_kind_and_only_the_credit_it_is_given(data_folder, monkeypatch):
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(data_folder / "clear.png")
    record = {"pictures": [str(data_folder / "clear.png")], "kind": "all", "language": "all", "question": "What?",
              "right": "a cat", "truth": "a cat"}  # fmt: skip
    written = []
    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", lambda self, at, text, *rest: written.append(text))
    sheet.draw_sheet([record], data_folder / "sheet.png")
    with Image.open(data_folder / "sheet.png") as drawn:
        assert drawn.getpixel((sheet.MARGIN + 100, sheet.MARGIN + 100)) == (255, 255, 255)  # what is clear is white
        assert drawn.height < sheet.CELL + 3 * 3 * sheet.LINE  # room for one question
    assert "a cat" in written and not [text for text in written if "OpenMoji" in text]


def test_a_sheet_draws_the_answer_with_most_boxes_and_calls_it_right_where_it_fits(data_folder, monkeypatch):
    Image.new("RGB", (40, 20), (90, 90, 90)).save(data_folder / "grey.png")
    said = ["<box> 0 0 10 10", "cat <box> 20 20 60 60, bus <box> 61 61 90 90"]
    record = {"pictures": [str(data_folder / "grey.png")], "kind": "box", "language": "en", "question": "Where?"}
    records = [
        {**record, "right": right, "truth": "<box> 20 20 60 61", "iou": {"right": iou}}
        for right, iou in zip(said, (0.0, 0.9), strict=True)
    ]
    drawn, written = [], []
    monkeypatch.setattr(sheet, "draw_boxes", lambda cell, text, side: drawn.append((cell.size, text, side)))
    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", lambda self, at, *rest: written.append(rest[:2]))
    sheet.draw_sheet(records, data_folder / "sheet.png")
    assert drawn == [((sheet.CELL, sheet.CELL), said[1], sheet.CELL)]
    colours = {text[:12]: colour for text, colour in written}
    assert (colours[said[0][:12]], colours[said[1][:12]]) == (sheet.RED, sheet.GREEN)
    assert any("IoU of 0.5 and more" in text for text, _ in written)
    monkeypatch.undo()
    sheet.draw_sheet(records, data_folder / "sheet.png")
    with Image.open(data_folder / "sheet.png") as picture:
        cell = picture.crop((sheet.MARGIN, sheet.MARGIN, sheet.MARGIN + sheet.CELL, sheet.MARGIN + sheet.CELL))
        assert {COLOURS[0], COLOURS[1]} <= {colour for _, colour in cell.getcolors(100_000)}


def test_chinese_without_a_font_is_left_out_by_its_letters(data_folder, monkeypatch):
    monkeypatch.setattr(sheet, "chinese_font", lambda size: None)
    picture = {"pictures": [str(data_folder / "images/0_0.png")], "kind": "all", "language": "all", "right": "",
               "truth": "杯"}  # fmt: skip
    sheet.draw_sheet([{**picture, "question": "这是什么？"}], data_folder / "sheet.png")
    with Image.open(data_folder / "sheet.png") as drawn:
        assert drawn.height < sheet.CELL
