"""Data about pictures of real things: what is learnt, what is held out, which pictures differ, and how."""

import json
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from dataset.readers.opening import open_data
from helpers.own_pictures import draw_stamps
from model.messages import UserError
from scripts import build_real_pictures
from scripts.build_real_pictures import KIND, NAME, read_things
from scripts.data import openmoji, placing
from scripts.data.placing import place_plainly, place_variously

FEW = {"A bird.": "🐔🐧🦅🦢", "A fruit.": "🍉🍊🍋🍓", "": "⌚🔥"}


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    monkeypatch.setattr(openmoji, "KINDS", FEW)


def build(output: Path, *flags: str) -> dict[str, list[dict]]:
    build_real_pictures.main(["--output", str(output), *flags])
    files = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in output.glob("*.jsonl")}
    return {name: [json.loads(line) for line in lines] for name, lines in files.items()}


def test_stamps_and_drawings_are_learnt_and_stamps_held_out(tmp_path, capsys):
    count = draw_stamps(tmp_path / "stamps")
    flags = ("--stamps", str(tmp_path / "stamps"), "--held_out", "0.4", "--stamp_drawings", "3")
    files = build(tmp_path / "data", *flags)
    held = {line["image"] for line in files["held_out"]}
    assert f"{count + 10 - len(held)} things to learn from, 10 of them OpenMoji's; {len(held)} held out" in (
        capsys.readouterr().out
    )
    assert len(files["pretrain"]) == len(files["captions"]) == count + 10 - len(held)
    learnt = {line["caption"] for line in files["captions"]}
    names = {line["conversations"][1]["content"] for line in files["held_out"] if line["kind"] == "name"}
    assert "A chicken." in learnt and names and not names & learnt
    assert len({line["image"] for line in files["sft"]}) == 3 * (count - len(held)) + 10
    for name in ("pretrain", "sft", "held_out"):  # as the stages and scripts/score.py read them
        samples = open_data(tmp_path / f"data/{name}.jsonl")
        assert all(samples[number].open_pictures()[0].size == (224, 224) for number in range(len(samples)))
    asked = [line["conversations"][0]["content"].removeprefix("<image>\n") for line in files["held_out"]]
    assert set(asked) == {NAME, KIND} and all(line["folder"] for line in files["held_out"])


def test_a_part_of_what_is_learnt_can_be_held_out_to_choose_by(tmp_path):
    draw_stamps(tmp_path)
    train, held_out = read_things(tmp_path, 0.4, 0.0, 42)
    fewer, chosen = read_things(tmp_path, 0.4, 0.4, 42)
    assert chosen and not {thing.captions["en"] for thing in chosen} & {thing.captions["en"] for thing in held_out}
    assert sorted(map(repr, [*fewer, *chosen])) == sorted(map(repr, train))


def test_without_the_stamps_drawings_are_held_out_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_real_pictures, "STAMPS", tmp_path / "none")
    train, held_out = read_things(tmp_path / "none", 0.3, 0.0, 42)
    assert len(train) + len(held_out) == 10 and held_out and {thing.folder for thing in train} == {"openmoji"}
    assert f"{tmp_path / 'none'} is not there: OpenMoji's drawings alone; `apt-get" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no folder"):
        read_things(tmp_path / "mistyped", 0.3, 0.0, 42)


def test_every_drawing_of_the_table_has_a_picture_and_a_name(monkeypatch):
    monkeypatch.undo()
    glyphs = openmoji.read_glyphs()
    characters = "".join(openmoji.KINDS.values())
    assert len(glyphs) == len(characters) == len(set(characters))
    names = {glyph.character: glyph.name["en"] for glyph in glyphs}
    assert (names["🦉"], names["🍇"], names["🚌"]) == ("An owl.", "Some grapes.", "A bus.")
    assert min(openmoji.draw_glyph(glyphs[0]).size) > 50


def test_twins_of_drawings_stand_on_one_side():
    found = [{glyph.english for glyph in family} for family in openmoji.glyph_families([
        openmoji.Glyph("", name, {}) for name in ("mouse", "mouse face", "pen", "fountain pen", "bus")])]  # fmt: skip
    assert found == [{"mouse", "mouse face"}, {"pen", "fountain pen"}, {"bus"}]


def test_pictures_of_one_thing_differ_and_a_letter_is_never_mirrored(monkeypatch):
    cut_out = Image.new("RGBA", (60, 60))
    cut_out.paste((200, 0, 0, 255), (0, 0, 20, 60))  # a red bar at the left, nothing at the right

    rng = Random(1)
    various = [place_variously(cut_out, True, rng) for _ in range(16)]
    plain = [place_plainly(cut_out, rng) for _ in range(4)]
    assert len({picture.tobytes() for picture in (*plain, *various)}) == 20
    grounds = [picture.getpixel((0, 0)) for picture in various]
    assert (255, 255, 255) in grounds and len(set(grounds)) > 4
    turned = []
    monkeypatch.setattr(placing, "_place", lambda cut_out, *_others: turned.append(cut_out))
    for mirrored in (True, False):
        for _ in range(16):
            place_variously(cut_out, mirrored, rng)
    left = [picture.getbbox()[0] + picture.getbbox()[2] < picture.width for picture in turned]
    assert set(left[:16]) == {True, False} and set(left[16:]) == {True}
