"""The harder exam of Emoji World: its families, that its answers are true, and that nothing in it was practised."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam import emoji_choices, emoji_exam
from dataset.exam.caption_facts import facts
from dataset.exam.emoji_exam import write_exam
from dataset.exam.emoji_wordings import UNSEEN
from dataset.exam.questions import read_questions
from helpers.emoji import PLACES, check_answer, check_pair, check_relation, check_talk, check_turns, names_of
from scripts.build_emoji_world import SEEDS

COUNT = 4
SIX = {"what", "at", "where", "count", "colour", "yesno"}
FAMILIES = {
    "trained": SIX, "reworded": SIX, "behind": SIX, "all_names": SIX, "many": SIX, "relations": {"beside", "larger"},
    "pictures": {"both", "which"}, "talks": {"where", "what", "beside"}, "captions": {"caption"}, "blurred": SIX,
    "turned": SIX, "grey": SIX - {"colour"}, "photographs": SIX - {"colour"},
}  # fmt: skip
GROUND = Image.fromarray(np.arange(224 * 224 * 3, dtype=np.uint32).reshape(224, 224, 3).astype(np.uint8) // 4)


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> SimpleNamespace:
    """folder, count, records; scenes (all that were sampled) by picture; sampled, what they were sampled with."""
    folder, scenes, sampled = tmp_path_factory.mktemp("exam"), {}, []
    sample, pair = world.sample_scene, world.sample_pair

    def watched(seed: str, split: str, index: int, *options: int, **more: int) -> world.Scene:
        sampled.append((str(seed), split))
        scene = sample(seed, split, index, *options, **more)
        return scenes.setdefault(f"{seed.split(':')[1]}_{index:04d}.jpg", scene)

    def watched_pair(seed: str, split: str, index: int, *options: int) -> tuple:
        sampled.append((str(seed), split))
        found = pair(seed, split, index, *options)
        scenes.update({f"pictures_{index:04d}_{number + 1}.jpg": found[number] for number in range(2)})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "sample_scene", watched)
        patch.setattr(world, "sample_pair", watched_pair)
        patch.setattr(emoji_exam, "photographs", lambda: {"grain": GROUND})
        count = write_exam(folder, COUNT)
    return SimpleNamespace(folder=folder, count=count, records=read(folder), scenes=scenes, sampled=sampled)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "exam.jsonl").read_text(encoding="utf-8").splitlines()]


def of(exam: SimpleNamespace, category: str) -> list[dict]:
    return [record for record in exam.records if record["category"] == category]


def asked(record: dict) -> list[tuple[str, str]]:
    """Questions and answers without the pictures' places."""
    return [
        (question.replace("<image>", "").strip(), answer) for question, answer in check_turns(record["conversations"])
    ]


def test_every_family_is_there_with_its_kinds(exam):
    kinds = {category: {record["kind"] for record in of(exam, category)} for category in FAMILIES}
    assert kinds == FAMILIES and {record["category"] for record in exam.records} == set(FAMILIES)
    counts = Counter(record["category"] for record in exam.records)
    whole = {name: 6 * COUNT for name in ("trained", "reworded", "behind", "all_names", "many")}
    half = {"blurred": 6 * COUNT // 2, "turned": 6 * COUNT // 2, "grey": 5 * COUNT // 2, "photographs": 5 * COUNT // 2}
    for name, count in {**whole, **half, "captions": COUNT}.items():
        assert counts[name] == count
    languages = Counter((record["category"], record["language"]) for record in exam.records)
    assert all(languages[name, language] for name in FAMILIES for language in ("en", "zh"))
    questions = read_questions(exam.folder / "exam.jsonl")  # with the project's own reader, which opens the pictures
    assert len(questions) == exam.count == len(exam.records)
    assert [question.category for question in questions] == [record["category"] for record in exam.records]
    assert "CC BY-SA 4.0" in (exam.folder / "LICENSE.txt").read_text()


def test_every_answer_is_true(exam):
    for record in exam.records:
        category, kind, language, pairs = record["category"], record["kind"], record["language"], asked(record)
        shown = [exam.scenes[image] for image in record["image"].split(",")]
        if category == "pictures":
            assert check_pair(shown, language, *pairs[0]) == kind and len(shown) == 2
        elif category == "relations":
            assert check_relation(shown[0], language, *pairs[0]) == kind
        elif category == "talks":
            check_talk(shown[0], kind, language, pairs)
        elif category == "captions":
            [(_, caption)] = pairs
            places = [PLACES[language][thing.place] for thing in shown[0].things]
            assert facts(caption)["places"] == set(zip(names_of(shown[0], language), places, strict=True))
        else:
            check_answer(shown[0], kind, language, *pairs[0])
        assert len(pairs) == (2 if category == "talks" else 1)


def test_three_ways_of_asking_the_same(exam):
    trained, reworded, behind = (of(exam, name) for name in ("trained", "reworded", "behind"))
    for first, other, turned in zip(trained, reworded, behind, strict=True):
        for again in (other, turned):
            assert [again[key] for key in ("image", "kind", "language")] == [
                first[key] for key in ("image", "kind", "language")
            ]
        assert asked(turned) == asked(first)
        assert first["conversations"][0]["content"].startswith("<image>\n")
        assert turned["conversations"][0]["content"].endswith("\n<image>")
        [(question, answer)], [(words_of_other, same)] = asked(first), asked(other)
        assert answer == same and question != words_of_other
        scene, kind, language = exam.scenes[first["image"]], first["kind"], first["language"]
        about = {check_answer(scene, kind, language, text, answer) for text in (question, words_of_other)}
        assert len(about) == 1  # the same thing or place


def test_no_training_says_what_the_reworded_ask():
    for language, kinds in UNSEEN.items():
        subjects = [getattr(concept, language) for concept in world.concepts()] + PLACES[language]
        trained = filled(words.QUESTIONS[language], subjects, language)
        unseen = filled(kinds, subjects, language)
        assert len(unseen) > 5000 and not unseen & trained


def filled(kinds: dict, subjects: list[str], language: str) -> set[str]:
    wordings = [wording for kind in SIX for wording in kinds[kind]]
    article = words.with_article if language == "en" else str
    return {wording.format(subject, a=article(subject)) for wording in wordings for subject in subjects}


def test_scenes_are_of_the_sizes_and_names_promised(exam):
    sizes = {
        name: Counter(len(exam.scenes[r["image"].split(",")[0]].things) for r in of(exam, name)) for name in FAMILIES
    }
    assert min(sizes["many"]) >= 5 and max(sizes["many"]) <= 9 and len(sizes["many"]) > 1
    assert all(max(counts) <= 4 for name, counts in sizes.items() if name != "many")
    assert min(sizes["relations"]) == 2 == min(sizes["talks"])
    concepts = {name: [thing.concept for scene in exam.scenes if scene.startswith(name)
                       for thing in exam.scenes[scene].things] for name in FAMILIES}  # fmt: skip
    assert max(concepts["all_names"]) > 400 and max(concepts["many"]) < 144
    assert all(max(found, default=0) < 128 for name, found in concepts.items() if name not in ("all_names", "many"))


def test_nothing_else_shows_its_scenes(exam):
    others = {str(420 + seed) for seed in (*SEEDS.values(), emoji_choices.SEED)}
    assert {split for _, split in exam.sampled} == {"held_out"}
    assert not {seed.split(":")[0] for seed, _ in exam.sampled} & others
    assert len(set(exam.scenes.values())) == len(exam.scenes) == 6 * COUNT + 2 * COUNT + 4 * (COUNT // 2)


def picture(exam: SimpleNamespace, name: str) -> np.ndarray:
    return np.asarray(Image.open(exam.folder / "images" / name)).astype(float)


def strange(exam: SimpleNamespace, category: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(The exam's picture, the same scene drawn plainly, where its things are) for each of a family."""
    found = []
    for name in sorted({record["image"] for record in of(exam, category)}):
        plain, labels = world.render(exam.scenes[name])
        covered = np.kron(np.array(labels) >= 0, np.ones((16, 16), bool))
        found.append((picture(exam, name), np.asarray(plain).astype(float), covered))
    assert len(found) == COUNT // 2
    return found


def test_strange_pictures_are_strange_in_one_way(exam):
    def roughness(pixels: np.ndarray) -> float:
        return np.abs(np.diff(pixels, axis=0)).mean()

    for shown, plain, _ in strange(exam, "blurred"):
        assert np.abs(shown - plain).mean() < 8 and roughness(shown) < 0.7 * roughness(plain)
    for shown, plain, _ in strange(exam, "grey"):
        assert np.ptp(shown, axis=2).max() <= 2  # no colours
        assert np.abs(shown.mean(-1) - plain @ (0.299, 0.587, 0.114)).mean() < 2
    for shown, plain, covered in strange(exam, "turned"):
        assert np.abs(shown - plain)[covered].mean() > 10  # far from the plain one where things are
        assert np.abs(shown - plain)[:8, :8].mean() < 3
    for shown, plain, covered in strange(exam, "photographs"):
        assert np.abs(shown - plain)[covered].mean() < np.abs(shown - plain)[~covered].mean()
        assert np.abs(shown - np.asarray(GROUND))[~covered].mean() < np.abs(shown - plain)[~covered].mean()
    for name in ("trained", "many"):
        shown = of(exam, name)[0]["image"]
        assert np.abs(picture(exam, shown) - np.asarray(world.render(exam.scenes[shown])[0])).mean() < 4


def test_things_are_turned_further_than_training_turns_any(tmp_path, monkeypatch):
    drawn, render = [], world.render
    monkeypatch.setattr(world, "render", lambda scene, *ground: drawn.append(scene) or render(scene, *ground))
    scene = world.sample_scene(1, "train", 3, 128)
    emoji_exam._turned(scene, emoji_exam.Random(0))
    [turned] = drawn
    assert all(60 <= thing.angle <= 300 for thing in turned.things)
    assert [(t.concept, t.place, t.size) for t in turned.things] == [(t.concept, t.place, t.size) for t in scene.things]


def test_without_scikit_image_photographs_are_left_out_and_it_is_told(tmp_path, monkeypatch, capsys):
    def missing() -> dict:
        raise ImportError("No module named 'skimage'")

    monkeypatch.setattr(emoji_exam, "photographs", missing)
    for name in ("a", "b"):
        write_exam(tmp_path / name, 1)
        said = capsys.readouterr().out
        assert said.startswith("scikit-image is not installed") and "`make real`" in said and said.count("\n") == 1
    assert {record["category"] for record in read(tmp_path / "a")} == set(FAMILIES) - {"photographs"}
    files = [
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    ]
    assert files[0] == files[1] and len(files[0]) > 10  # two exams are the same bytes
