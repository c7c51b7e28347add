"""Four choices about a held-out scene: one is true, three are not, and no letter is likelier than another."""

from collections import Counter

import pytest

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.emoji_choices import KINDS, SEED, emoji_choices
from helpers.emoji import check_answer
from model.pictures import open_picture

VOCABULARY = 128


@pytest.fixture(scope="module")
def questions():
    return emoji_choices(60, 42, VOCABULARY)


def test_one_choice_is_true(questions):
    for number, question in enumerate(questions):
        scene = world.sample_scene(42 * 10 + SEED, "held_out", number // len(KINDS), VOCABULARY)
        asked = scene, question.kind, question.language, question.sample.extra["question"]
        assert len(set(question.choices)) == 4
        for letter, choice in zip("ABCD", question.choices, strict=True):
            if letter == question.truth:
                check_answer(*asked, choice)
            else:
                with pytest.raises((AssertionError, KeyError)):
                    check_answer(*asked, choice)


def test_letters_kinds_and_languages_are_balanced(questions):
    assert Counter(question.truth for question in questions) == dict.fromkeys("ABCD", 15)
    assert Counter(question.kind for question in questions) == dict.fromkeys(KINDS, 12)
    assert Counter(question.language for question in questions) == {"en": 30, "zh": 30}
    assert all(question.category == question.kind for question in questions)


def test_choices_are_of_one_kind(questions):
    names = {language: {world.name(n, language) for n in range(VOCABULARY)} for language in world.LANGUAGES}
    for question in questions:
        kinds = {"at": names, "where": words.PLACES, "count": words.NUMBERS, "colour": words.COLOURS}
        if question.kind in kinds:
            assert set(question.choices) <= set(kinds[question.kind][question.language])
        else:
            assert len({choice.count("、") + choice.count(", ") for choice in question.choices}) == 1


def test_what_else_is_there_is_offered(questions):
    """A model that knows the things and not their places cannot tell."""
    offered = 0
    for number, question in enumerate(questions):
        if question.kind == "at":
            scene = world.sample_scene(42 * 10 + SEED, "held_out", number // len(KINDS), VOCABULARY)
            there = {world.name(thing.concept, question.language) for thing in scene.things}
            offered += len(there & set(question.choices))
            assert there <= set(question.choices)
    assert offered > 20


def test_the_same_again(questions):
    again = emoji_choices(10, 42, VOCABULARY)
    assert [q.sample.pictures for q in again] == [q.sample.pictures for q in questions[:10]]
    assert [q.choices for q in again] == [q.choices for q in questions[:10]]
    assert emoji_choices(10, 43, VOCABULARY)[0].sample.pictures != questions[0].sample.pictures
    assert open_picture(questions[0].sample.open_pictures()[0]).size == (224, 224)
