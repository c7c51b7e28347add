"""What a caption states, and how much of it is true, beside the scene itself and a count by hand."""

import pytest

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.caption_facts import FACTS, facts, precision_and_recall
from helpers.emoji import CHINESE_GROUNDS, NUMBERS, PLACES, ground_of, names_of

TRUTH = "Two things on a red ground: cat at the top left, sun at the centre."
NOTHING = {"precision": None, "recall": None}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_caption_states_its_scene(language):
    colours = {"en": {name: name for name in CHINESE_GROUNDS.values()},
               "zh": {english: chinese for chinese, english in CHINESE_GROUNDS.items()}}[language]  # fmt: skip
    for index in range(150):
        scene = world.sample_scene(1, "train", index, max_things=9)
        names = names_of(scene, language)
        places = [PLACES[language][thing.place] for thing in scene.things]
        assert facts(words.caption(scene, language)) == {
            "things": set(names), "places": set(zip(names, places, strict=True)),
            "ground": {colours[ground_of(scene)]}, "count": {NUMBERS[language][len(scene.things) - 1]},
        }  # fmt: skip


@pytest.mark.parametrize(
    "sentence",
    ["", "A cat and a sun.", "cat at the top left, sun at the centre", "Two things on a red ground.",
     "左上是猫，右边是狗。", "橙色背景上有三样东西。", "Two things on a red ground: "],
)  # fmt: skip
def test_a_sentence_of_another_form_states_nothing(sentence):
    assert facts(sentence) == dict.fromkeys(FACTS, frozenset())
    assert precision_and_recall([(sentence, TRUTH)]) == dict.fromkeys(FACTS, {"precision": None, "recall": 0.0})


def test_words_that_are_no_colour_number_or_place_are_no_facts():
    stated = facts("Twelve things on a pink ground: cat at the top left, sun at the moon, dog")
    assert stated == {"things": {"cat", "sun"}, "places": {("cat", "top left")}, "ground": set(), "count": set()}


def test_precision_and_recall_by_hand():
    """Said 3 + 1 things, true 2 + 2, of which 1 + 1; the number and the colour are right once, said twice."""
    said = "Three things on a red ground: cat at the top, dog at the centre, fox at the left."
    chinese = ("橙色背景上有一样东西：左上是猫。", "蓝色背景上有两样东西：左上是猫，右边是狗。")
    found = precision_and_recall([(said, TRUTH), chinese, ("I cannot see.", TRUTH)])
    assert found["things"] == {"precision": 0.5, "recall": round(2 / 6, 4)}
    assert found["places"] == {"precision": 0.25, "recall": round(1 / 6, 4)}
    assert found["ground"] == {"precision": 0.5, "recall": round(1 / 3, 4)}
    assert found["count"] == {"precision": 0.0, "recall": 0.0}


def test_nothing_said_and_nothing_true():
    assert precision_and_recall([]) == dict.fromkeys(FACTS, NOTHING)
    assert precision_and_recall([(TRUTH, "yes")])["things"] == {"precision": 0.0, "recall": None}
    assert precision_and_recall([(TRUTH, TRUTH)]) == dict.fromkeys(FACTS, {"precision": 1.0, "recall": 1.0})
