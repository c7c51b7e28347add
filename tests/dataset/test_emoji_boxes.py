"""Emoji World's boxes: true of the pixels, asked for in both languages, in words that say what is wanted."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from dataset import emoji_boxes
from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.boxes import Box, boxes_in, named_boxes
from helpers.emoji import check_turns, fits, language_of, names_of


def seen_box(scene: world.Scene, number: int) -> Box:
    """From pictures alone: around the pixels that one thing changes by half or more of what any thing could."""
    alone = replace(scene, things=(scene.things[number],))
    black, white = (np.asarray(world.render(replace(alone, rgb=(level,) * 3))[0]).astype(int) for level in (0, 255))
    rows, columns = np.nonzero((white - black).mean(-1) < 127.5)  # which ground it is shows through less than half
    corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return Box(*(round(100 * corner / 224) for corner in corners))


@pytest.mark.parametrize("most", [1, 4, 9])
def test_boxes_are_those_of_the_pixels_that_are_drawn(most):
    checked = 0
    for index in range(40 // most):
        scene = world.sample_scene(11, "train", index, max_things=most, min_things=most)
        assert world.boxes(scene) == [seen_box(scene, number) for number in range(most)]
        checked += most
    assert checked >= 36


def test_outside_of_all_boxes_is_the_ground_alone():
    """But for the fringe of half a pixel that a thing hides less than half of."""
    for index in range(12):
        scene = world.sample_scene(12, "held_out", index, 128)
        picture = np.asarray(world.render(scene)[0]).astype(int)
        changed = np.abs(picture - np.asarray(scene.rgb)).max(-1) > 127
        for box in world.boxes(scene):
            left, top, right, bottom = (round(corner * 2.24) for corner in box)
            changed[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
        assert not changed.any()


def test_a_thing_at_the_edge_is_cut_off_there():
    scene = world.Scene(1, (165, 165, 165), (world.Thing(0, 0, 5.0, 219.0, 90.0, 0.0),))
    [box] = world.boxes(scene)
    assert box.left == 0 and box.bottom == 100 and box == seen_box(scene, 0)


def test_each_thing_is_asked_about_in_both_languages_and_all_of_them_at_once():
    for index in range(30):
        scene = world.sample_scene(13, "train", index, 128)
        asked = Counter()
        for [(opening, answer)] in map(check_turns, emoji_boxes.box_conversations(scene, Random(index))):
            assert opening.startswith("<image>\n")
            question = opening.removeprefix("<image>\n")
            language = language_of(question)
            names, boxes = names_of(scene, language), world.boxes(scene)
            if question in emoji_boxes.QUESTIONS[language]["boxes"]:
                assert named_boxes(answer) == list(zip(names, boxes, strict=True))
                assert answer.count("，" if language == "zh" else ", ") == len(names) - 1
                asked[language] += 1
                continue
            matches = [
                match for wording in emoji_boxes.QUESTIONS[language]["box"] if (match := fits(wording, question))
            ]
            [subject] = {match.group(1) for match in matches} & set(names)
            assert answer == str(boxes[names.index(subject)]) and boxes_in(answer) == [boxes[names.index(subject)]]
            asked[language, subject] += 1
        assert len(asked) == 2 * len(scene.things) + 2 and set(asked.values()) == {1}


def test_questions_say_that_boxes_are_wanted_and_are_no_others():
    for language in world.LANGUAGES:
        others = {wording for wordings in words.QUESTIONS[language].values() for wording in wordings}
        for kind in emoji_boxes.KINDS:
            wordings = emoji_boxes.QUESTIONS[language][kind]
            assert len(set(wordings)) == len(wordings) >= 10 and not others & set(wordings)
            assert all(("box" if language == "en" else "框") in wording for wording in wordings)
            assert all(wording.count("{}") == (kind == "box") for wording in wordings)


def test_both_kinds_can_be_asked_of_any_scene():
    scene = world.sample_scene(14, "held_out", 3, 128, min_things=3)
    assert len(boxes_in(emoji_boxes.ask(scene, "boxes", "zh", Random(1))[1])) == len(scene.things)
    subjects = {emoji_boxes.ask(scene, "box", "en", Random(seed))[1] for seed in range(40)}
    assert subjects == set(map(str, world.boxes(scene)))
