"""The stamps of Tux Paint as data: what they are called, which of them are twins, who is held out, what is asked."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from PIL import Image

from dataset.readers.opening import open_data
from helpers.own_pictures import draw_stamps
from scripts import build_stamps
from scripts.build_stamps import YES_NO
from scripts.data.stamps import Stamp, families, read_stamps, split

FILES = ("train", "held_out", "redrawn")


@pytest.fixture
def folder(tmp_path) -> Path:
    draw_stamps(tmp_path / "stamps")
    return tmp_path / "stamps"


@pytest.fixture
def stamps(folder) -> dict[str, Stamp]:
    return {stamp.picture.stem: stamp for stamp in read_stamps(folder)[0]}


def build(folder: Path, output: Path, *flags: str) -> dict[str, list[dict]]:
    build_stamps.main(["--stamps", str(folder), "--output", str(output), *flags])
    lines = {name: (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in FILES}
    return {name: [json.loads(line) for line in found] for name, found in lines.items()}


def said(record: dict) -> tuple[str, str]:
    question, answer = (message["content"] for message in record["conversations"])
    return question.removeprefix("<image>\n"), answer


def test_pictures_without_a_caption_and_svg_are_left_out_and_counted(tmp_path):
    count = draw_stamps(tmp_path)
    found, others = read_stamps(tmp_path)
    assert len(found) == count and others == {"without a caption": 1, "as SVG alone": 1}


def test_a_name_is_a_caption_that_is_no_remark(stamps):
    assert stamps["owl"].name == {"en": "An owl.", "zh": "猫头鹰。"}
    assert stamps["kiwi"].name == {"en": "A kiwifruit.", "zh": "猕猴桃。"}
    assert stamps["pear"].name["zh"] == "梨。"  # without the measure word
    assert stamps["lion"].captions["zh"] == "狮子。"  # the set says: an onion
    assert not stamps["fire"].name and stamps["pengwin"].name == {"en": "Penguins win."}


def test_the_deepest_folder_that_has_a_kind_says_it(stamps):
    kinds = {name: stamp.kind.get("en") for name, stamp in stamps.items()}
    assert (kinds["lion"], kinds["owl"], kinds["grapes"]) == ("A mammal.", "A bird.", "A fruit.")
    assert (kinds["tugboat"], kinds["fire"]) == ("A vehicle.", None)


def test_twins_are_of_one_family(stamps):
    found = {frozenset(stamp.picture.stem for stamp in family) for family in families(list(stamps.values()))}
    assert {frozenset({"lion", "lion-2"}), frozenset({"pig", "pig_golden"}), frozenset({"tugboat"})} <= found
    assert sum(map(len, found)) == len(stamps)


def test_no_family_stands_on_both_sides(stamps):
    everyone = list(stamps.values())
    for seed in range(8):
        train, held_out = split(everyone, 0.4, seed)
        assert len(train) + len(held_out) == len(everyone) and held_out
        assert not {stamp.captions["en"] for stamp in train} & {stamp.captions["en"] for stamp in held_out}
        assert len({stamp in held_out for stamp in (stamps["pig"], stamps["pig_golden"])}) == 1


def test_every_file_is_ordinary_data_and_says_kind_and_language(folder, tmp_path, capsys):
    files = build(folder, tmp_path / "data", "--drawings", "2", "--held_out", "0.4")
    assert "are held out; left out: 1 without a caption, 1 as SVG alone" in capsys.readouterr().out
    for name in FILES:
        samples = open_data(tmp_path / "data" / f"{name}.jsonl")
        assert len(samples) == len(files[name]) and all(len(samples[n].pictures) == 1 for n in range(len(samples)))
        assert len(list(groupby(line["image"] for line in files[name]))) == len({line["image"] for line in files[name]})
    with Image.open(tmp_path / "data/images" / files["train"][0]["image"]) as picture:
        assert (picture.mode, picture.size) == ("RGB", (224, 224)) and len(picture.getcolors(60000)) > 1
    for name in FILES[1:]:
        assert {line["kind"] for line in files[name]} == {"name", "kind of thing", "is it this", "is it of a kind"}
        assert {line["language"] for line in files[name]} == {"en", "zh"}
    assert "GPL-2" in (tmp_path / "data/LICENSE.txt").read_text()


def test_no_held_out_name_was_ever_an_answer(folder, tmp_path):
    files = build(folder, tmp_path / "data", "--held_out", "0.4")
    learnt = {said(line)[1] for line in files["train"]}
    assert not learnt & {said(line)[1] for line in files["held_out"] if line["kind"] == "name"}
    assert {said(line)[1] for line in files["redrawn"] if line["kind"] == "name"} <= learnt


def test_as_often_yes_as_no(folder, tmp_path):
    answers = [said(line)[1] for line in build(folder, tmp_path / "data", "--drawings", "6")["train"]]
    yes, no = (sum(answer in {words[index] for words in YES_NO.values()} for answer in answers) for index in (0, 1))
    assert yes > 50 and 0.8 < yes / no < 1.25  # a few stamps have nobody to be mistaken for, or no Chinese name


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    for name in ("first", "second", "other"):
        build(folder, tmp_path / name, "--seed", "8" if name == "other" else "7")
    first, second, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second", "other")
    )
    assert first == second and first["train.jsonl"] != other["train.jsonl"]


def test_what_cannot_be_built_is_said_with_the_cure(tmp_path, folder, capsys):
    with pytest.raises(build_stamps.UserError, match="apt-get install tuxpaint-stamps-default"):
        build_stamps.main(["--stamps", str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(build_stamps.UserError, match="no .png with a .txt beside it"):
        build_stamps.main(["--stamps", str(tmp_path / "empty")])
    with pytest.raises(SystemExit):
        build_stamps.main(["--stamps", str(folder), "--held_out", "1"])
    assert "--held_out must lie between 0 and 1" in capsys.readouterr().err
