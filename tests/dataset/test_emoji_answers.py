"""Emoji World's words: captions, questions, answers and notes, checked against their scenes by rules of their own."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from dataset import emoji_talks
from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.emoji_wordings import UNSEEN
from helpers.emoji import (
    CHINESE_GROUNDS,
    NUMBERS,
    PLACES,
    check_answer,
    check_relation,
    check_turns,
    fits,
    ground_of,
    language_of,
    names_of,
)


def test_captions_say_everything():
    for index in range(150):
        scene = world.sample_scene(1, "train", index, max_things=9)
        for language in ("en", "zh"):
            text = words.caption(scene, language)
            if language == "en":
                match = re.fullmatch(r"(\w+) (things?) on (an?) (\w+) ground: (.+)\.", text)
                number, things, article, ground, listed = match.groups()
                assert things == ("thing" if len(scene.things) == 1 else "things")
                assert article == ("an" if ground == "orange" else "a")
                pairs = [tuple(part.split(" at the ")) for part in listed.split(", ")]
                number = number[0].lower() + number[1:] if number[0].isupper() else None
            else:
                match = re.fullmatch("(.+)背景上有(.)样东西：(.+)。", text)
                ground, number, listed = match.groups()
                ground = CHINESE_GROUNDS[ground]
                pairs = [tuple(reversed(part.split("是", 1))) for part in listed.split("，")]
            assert ground == ground_of(scene)
            assert NUMBERS[language].index(number) == len(scene.things) - 1
            places = [PLACES[language][thing.place] for thing in scene.things]
            assert pairs == list(zip(names_of(scene, language), places, strict=True))


def test_one_caption_in_full():
    names = [concept.en for concept in world.concepts()]
    things = tuple(world.Thing(names.index(n), p, 0, 0, 50, 0) for n, p in (("cat", 0), ("sun", 4), ("dog", 5)))
    scene = world.Scene(3, (245, 170, 80), things)
    assert words.caption(scene, "en") == (
        "Three things on an orange ground: cat at the top left, sun at the centre, dog at the right."
    )
    assert words.caption(scene, "zh") == "橙色背景上有三样东西：左上是猫，中间是太阳，右边是狗。"
    alone = replace(scene, ground=6, things=things[:1])
    assert words.caption(alone, "en") == "One thing on a blue ground: cat at the top left."
    assert words.caption(alone, "zh") == "蓝色背景上有一样东西：左上是猫。"


@pytest.mark.parametrize("wordings", [words.QUESTIONS, UNSEEN], ids=["trained", "unseen"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["what", "at", "where", "count", "colour", "yesno"])
def test_answers_are_true(kind, language, wordings):
    assert kind in words.KINDS and len(words.KINDS) == 6
    rng = Random(f"{kind}{language}")
    used, ways = Counter(), len(wordings[language][kind])
    for index in range(25 * ways):
        split = ("train", "held_out")[index % 2]
        scene = world.sample_scene(6, split, index, max_things=(4, 9)[index % 3 == 0])
        question, answer = words.ask(scene, kind, language, rng, wordings=wordings)
        check_answer(scene, kind, language, question, answer)
        used.update(wording for wording in wordings[language][kind] if fits(wording, question))
    assert len(used) == ways and min(used.values()) > 7  # every way of asking


def test_no_training_asks_as_the_exam_does():
    for language, kinds in UNSEEN.items():
        trained = {wording for wordings in words.QUESTIONS[language].values() for wording in wordings}
        assert not trained & {wording for wordings in kinds.values() for wording in wordings}


def test_neighbours_and_sizes_by_pixels():
    """What is beside what by the places' rows and columns, which the things' centres bear out; larger by its size."""
    directions = Counter()
    for index in range(200):
        scene = world.sample_scene(6, "train", index, max_things=9)
        for thing, direction, other in words.neighbours(scene):
            phrase = ("left of", "right of", "above", "below")[direction]
            ahead = {"left of": thing.x - other.x, "right of": other.x - thing.x,
                     "above": thing.y - other.y, "below": other.y - thing.y}  # fmt: skip
            assert words.DIRECTIONS["en"][direction] == phrase and ahead[phrase] > 40
            also = [
                third for third in scene.things if third not in (thing, other)
                and {"left of": thing.x - third.x, "right of": third.x - thing.x,
                     "above": thing.y - third.y, "below": third.y - thing.y}[phrase] > 40
            ]  # fmt: skip
            assert not also  # the only one: the question has one answer
            directions[phrase] += 1
        for larger, smaller in words.unequal(scene):
            assert larger.size > 1.25 * smaller.size
    assert min(directions.values()) > 50 and len(directions) == 4


@pytest.mark.parametrize("language", ["en", "zh"])
def test_relations_are_true(language):
    asked = Counter()
    for index in range(200):
        scene = world.sample_scene(5, "train", index)
        for kind in set(words.askable(scene)) - set(words.KINDS):
            assert check_relation(scene, language, *words.ask(scene, kind, language, Random(index))) == kind
            asked[kind] += 1
    assert min(asked[kind] for kind in words.RELATIONS) > 40


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'why' is none of"):
        words.ask(world.sample_scene(0, "train", 0), "why", "en", Random(0))


@pytest.mark.parametrize("vocabulary", [None, 128])
def test_half_of_the_yes_no_questions_are_about_an_absence(vocabulary):
    rng = Random(0)
    known = world.concepts()[:vocabulary]
    counts, absent = Counter(), Counter()
    for index in range(1600):
        language = ("en", "zh")[index % 2]
        scene = world.sample_scene(8, "train", index, vocabulary)
        question, answer = words.ask(scene, "yesno", language, rng, vocabulary)
        subject = check_answer(scene, "yesno", language, question, answer)
        asked = [number for number, concept in enumerate(known) if getattr(concept, language) == subject]
        assert len(asked) == 1  # never about what the vocabulary leaves out
        present = asked[0] in {thing.concept for thing in scene.things}
        assert present == (answer in ("yes", "有"))
        counts[answer] += 1
        absent[asked[0]] += not present
    assert set(counts) == {"yes", "no", "有", "没有"}
    for yes in ("yes", "有"):
        assert abs(counts[yes] - 400) < 4 * (800 * 0.25) ** 0.5
    assert sum(absent.values()) == counts["no"] + counts["没有"]
    assert len([concept for concept in absent if absent[concept]]) > 0.5 * len(known)


def test_every_thing_is_asked_about():
    scene = next(s for s in (world.sample_scene(0, "train", n) for n in range(99)) if len(s.things) == 4)
    asked = Counter(
        check_answer(scene, "where", "en", *words.ask(scene, "where", "en", rng)) for rng in [Random(1)] * 400
    )
    assert sorted(asked) == sorted(names_of(scene, "en"))
    assert min(asked.values()) > 60


def kind_of(scene, language, question, answer) -> str:
    """The one kind whose checker accepts a question with its answer."""
    found = []
    for kind in words.KINDS:
        try:
            check_answer(scene, kind, language, question, answer)
        except (AssertionError, KeyError, ValueError):
            continue
        found.append(kind)
    assert len(found) >= 1, f"{question!r} {answer!r} is true of no kind"
    return found[0]


def is_roll_call(turns: list[dict]) -> bool:
    question = turns[0]["content"].removeprefix("<image>\n")
    return any(fits(wording, question) for wordings in emoji_talks.ROLL_CALLS.values() for wording in wordings)


def split_conversations(conversations: list[list[dict]]) -> tuple[list, list, list, set[str]]:
    """Single questions, talks and captions as (question, answer) pairs without their context, and the contexts."""
    singles, talks, captions, contexts = [], [], [], set()
    for turns in conversations:
        (opening, answer), *more = check_turns(turns)
        context, question = opening.split("\n")
        contexts.add(context)
        if question in {request for requests in words.CAPTION_REQUESTS.values() for request in requests}:
            captions.append((question, answer))
        else:
            (talks.append if more else singles.append)([(question, answer), *more])
    return singles, talks, captions, contexts


def test_conversations_about_a_picture():
    """Each question alone, so that no earlier turn gives its answer away; a talk, and a caption."""
    kinds, languages, captions = Counter(), Counter(), Counter()
    talked = behind = 0
    for index in range(160):
        scene = world.sample_scene(9, "train", index, 128)
        conversations = emoji_talks.question_conversations(scene, Random(index), 10, 128)
        roll_calls = [turns for turns in conversations if is_roll_call(turns)]
        conversations = [turns for turns in conversations if turns not in roll_calls]
        assert len(roll_calls) == 2
        if conversations[-1][0]["content"].endswith("\n<image>"):
            question, answer = conversations.pop()
            opening = {**question, "content": "<image>\n" + question["content"].removesuffix("\n<image>")}
            assert [opening, answer] == conversations[0]
            behind += 1
        singles, talks, [(request, caption)], contexts = split_conversations(conversations)
        assert contexts == {"<image>"}
        assert 4 <= len(singles) <= 11 and len(talks) <= 1
        talked += sum(len(talk) for talk in talks)
        for talk in (*singles, *talks):
            assert len(set(talk)) == len(talk) <= emoji_talks.TALK
            for question, answer in talk:
                language = language_of(question)
                kinds[kind_of(scene, language, question, answer)] += 1
                languages[language] += 1
        assert caption == words.caption(scene, language_of(request))
        [(opening, alone)] = check_turns(emoji_talks.caption_conversation(scene, Random(index)))
        assert opening.startswith("<image>\n") and alone == words.caption(scene, language_of(opening))
        captions[request] += 1
    assert talked > 320 and 6 <= behind <= 26
    assert set(kinds) == set(words.KINDS)
    assert min(languages.values()) > 0.4 * languages.total()
    assert len(captions) > 5


def test_reading_practice_is_true_of_its_scene():
    """Described in words, as notes or as a caption, then asked: every answer is true."""
    ways = Counter()
    for index in range(80):
        scene = world.sample_scene(4, "train", index, 128)
        singles, talks, captions, contexts = split_conversations(
            emoji_talks.reading_conversations(scene, Random(index), 6, 128)
        )
        [context] = contexts
        described = context in [words.caption(scene, language) for language in ("en", "zh")]
        ways["caption" if described else "notes"] += 1
        assert len(captions) == (not described)
        assert described or all(name in context for name in names_of(scene, language_of(context)))
        for request, answer in captions:
            assert answer == words.caption(scene, language_of(request))
        for question, answer in (pair for talk in (*singles, *talks) for pair in talk):
            kind_of(scene, language_of(question), question, answer)
    assert min(ways["caption"], ways["notes"]) > 8


def test_notes_are_true_and_complete():
    rng = Random(3)
    for index in range(300):
        scene = world.sample_scene(2, "train", index)
        for language, comma, space in (("en", ", ", " "), ("zh", "，", "")):
            remarks = Counter(words.notes(scene, language, rng).split(comma))
            places = [PLACES[language][thing.place] for thing in scene.things]
            wanted = [place + space + name for place, name in zip(places, names_of(scene, language), strict=True)]
            ground = ground_of(scene)
            if language == "zh":
                ground = next(chinese for chinese, english in CHINESE_GROUNDS.items() if english == ground)
            wanted.append(f"{ground}背景" if language == "zh" else f"{ground} ground")
            times = {remarks.pop(remark) for remark in wanted}
            assert len(times) == 1
            number = NUMBERS[language][len(scene.things) - 1]
            assert all(remark.startswith(number) for remark in remarks) and remarks.total() <= 1


def test_notes_are_english():
    rng = Random(3)
    scene = world.Scene(0, (250, 250, 250), (world.Thing(0, 4, 112, 112, 60, 0),))
    assert not [text for text in (words.notes(scene, "en", rng) for _ in range(50)) if "one things" in text]


def test_dictionary_turns_are_right():
    chinese = {concept.en: concept.zh for concept in world.concepts()[:128]}
    directions = Counter()
    for seed in range(20):
        for question, answer in check_turns(emoji_talks.translation_conversation(Random(seed), 10, 128)):
            to_chinese, to_english = (
                re.fullmatch("(.+)用中文怎么说？", question),
                re.fullmatch(r"What is (.+) in English\?", question),
            )
            if to_chinese:
                assert answer == chinese[to_chinese[1]]
            else:
                assert chinese[answer] == to_english[1]
            directions[bool(to_chinese)] += 1
    assert min(directions.values()) > 60
