"""Emoji World's talks: two pictures that share one thing, turns that say `it`, and how often what is asked."""

from collections import Counter
from random import Random

import pytest

from dataset import emoji_talks as talks
from dataset import emoji_words as words
from dataset import emoji_world as world
from helpers.emoji import (
    check_pair,
    check_relation,
    check_roll_call,
    check_talk,
    check_turns,
    fits,
    language_of,
    names_of,
    relation_of,
)
from model.messages import UserError

FOLLOW_UPS = [wording for kinds in talks.FOLLOW_UPS.values() for wordings in kinds.values() for wording in wordings]

# Two pictures


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_two_scenes_share_one_thing(split):
    sizes, seen = Counter(), set()
    for index in range(200):
        *scenes, shared = world.sample_pair(3, split, index, 128)
        assert (*scenes, shared) == world.sample_pair(3, split, index, 128)
        there = [{thing.concept for thing in scene.things} for scene in scenes]
        assert there[0] & there[1] == {shared} and max(there[0] | there[1]) < 128
        for scene, concepts in zip(scenes, there, strict=True):
            assert len(concepts) == len(scene.things)
            groups = {concept % 16 for concept in concepts}
            assert len(groups) == (len(concepts) if split == "train" else 1)
            sizes[len(concepts)] += 1
        seen.update(scenes)
    assert set(sizes) == {1, 2, 3, 4} and min(sizes.values()) > 60
    assert len(seen) == 400


def test_pairs_that_cannot_be_sampled():
    with pytest.raises(UserError, match="max_things 4 must be 1 to 2"):
        world.sample_pair(3, "held_out", 0, 64, max_things=4)  # 64 concepts are 4 of each group


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_what_is_asked_of_two_pictures_has_one_answer(split):
    kinds, answers = Counter(), Counter()
    for index in range(120):
        *scenes, shared = world.sample_pair(4, split, index, 128)
        asked = talks.pair_conversations(scenes, shared, Random(index), 5)
        contents = [check_turns(turns) for turns in asked]
        assert 1 <= len({pair for [pair] in contents}) == len(contents) <= 5
        for [(opening, answer)] in contents:
            assert opening.startswith("<image>\n<image>\n") and opening.count("<image>") == 2
            language = language_of(opening)
            kind = check_pair(scenes, language, opening.removeprefix("<image>\n<image>\n"), answer)
            kinds[kind, language] += 1
            answers[answer] += kind == "which"
    assert set(kinds) == {(kind, language) for kind in ("both", "which", "what") for language in world.LANGUAGES}
    assert min(answers[ordinal] for ordinal in ("first", "second", "第一张", "第二张")) > 20


def test_two_pictures_of_one_thing_are_not_told_apart():
    scene = world.Scene(0, (250, 250, 250), (world.Thing(5, 4, 112, 112, 60, 0),))
    assert talks.askable_of_pair([scene, scene]) == ("both",)
    asked = talks.pair_conversations([scene, scene], 5, Random(0), 40)
    kinds = {check_pair([scene, scene], language_of(o), o.split("\n")[2], a) for [(o, a)] in map(check_turns, asked)}
    assert kinds == {"both", "what"}
    with pytest.raises(ValueError, match="no question tells them apart"):
        talks.ask_pair([scene, scene], 5, "which", "en", Random(0))


# Turns


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["where", "what", "beside"])
def test_second_turns_are_true_of_what_the_first_has_named(kind, language):
    follows, answers = Counter(), Counter()
    for index in range(150):
        scene = world.sample_scene(8, "train", index, 128)
        if kind != "beside" or words.neighbours(scene):
            pairs = talks.reference_talk(scene, Random(index), kind, language)
            check_talk(scene, kind, language, pairs)
            follows[pairs[1][0]] += 1
            answers[pairs[1][1]] += 1
    assert len(follows) == (8 if kind == "beside" else 2) and len(answers) > 8  # each way of asking, all places


def test_a_picture_behind_goes_behind_the_first_question():
    turns = talks.conversation([("What?", "cat"), ("Where?", "top")], "<image>\n<image>")
    moved = talks.picture_behind(turns, "<image>\n<image>")
    assert [turn["content"] for turn in moved] == ["What?\n<image>\n<image>", "cat", "Where?", "top"]
    assert turns[0]["content"] == "<image>\n<image>\nWhat?"  # the other one stays as it was


# How often


@pytest.mark.parametrize(("language", "most"), [("en", 4), ("zh", 9)])
def test_a_roll_call_says_of_each_name_where_it_is_or_no(language, most):
    there, absent, orders, vocabulary = 0, 0, Counter(), 144
    for index in range(150):
        scene = world.sample_scene(5, "train", index, vocabulary, most)
        question, answer = talks.roll_call(scene, Random(index), language, vocabulary)
        [called] = [match[1] for wording in talks.ROLL_CALLS[language] if (match := fits(wording, question))]
        present, others = check_roll_call(scene, language, called, answer)
        assert present + others == min(len(scene.things) + max(2, len(scene.things)), talks.MOST_CALLED)
        there, absent = there + present, absent + others
        names = called.split({"en": ", ", "zh": "、"}[language])
        orders[names[0] in names_of(scene, language)] += 1
    assert 0.8 < absent / there < 1.5 and min(orders.values()) > 40


@pytest.mark.parametrize(("behind", "expected"), [(0.0, 0), (0.3, 60), (1.0, 200)])
def test_so_many_pictures_stand_behind_a_question_as_was_asked_for(behind, expected):
    moved = 0
    for index in range(200):
        scene = world.sample_scene(9, "train", index, 128)
        conversations = talks.question_conversations(scene, Random(index), 2, 128, behind=behind)
        where = [turns[0]["content"].endswith("\n<image>") for turns in conversations]
        assert not any(where[:-1])
        moved += where[-1]
    assert abs(moved - expected) <= 4 * (200 * behind * (1 - behind)) ** 0.5


@pytest.mark.parametrize("relations", [False, True])
def test_relations_are_asked_where_they_have_one_answer(relations):
    kinds, references = Counter(), 0
    for index in range(150):
        scene = world.sample_scene(2, "train", index, 128, max_things=9)
        for turns in talks.question_conversations(scene, Random(index), 6, 128, relations, behind=0):
            pairs = check_turns(turns)
            references += any(fits(wording, pairs[-1][0]) for wording in FOLLOW_UPS)
            for question, answer in pairs:
                question, language = question.removeprefix("<image>\n"), language_of(question)
                if relation_of(scene, language, question):
                    kinds[check_relation(scene, language, question, answer)] += 1
    if relations:
        assert set(kinds) == {"beside", "larger"} and min(kinds.values()) > 80
        assert references == 150  # one of each picture
    else:
        assert not kinds and references == 0


def test_things_of_nearly_one_size_are_not_compared():
    things = tuple(world.Thing(number, number, 0, 0, size, 0) for number, size in enumerate((60, 74, 76)))
    scene = world.Scene(0, (250, 250, 250), things)
    small, middle, large = names_of(scene, "en")
    asked = {words.ask(scene, "larger", "en", Random(index)) for index in range(80)}
    assert {answer for _, answer in asked} == {large}
    assert all(small in question and middle not in question for question, _ in asked)
    alike = world.Scene(0, (250, 250, 250), things[:2])
    assert "larger" not in words.askable(alike) and "beside" in words.askable(alike)
    with pytest.raises(ValueError, match="'larger' is none of"):
        words.ask(alike, "larger", "en", Random(0))
