"""Needles: every fact stands where it should, is found by its key alone, and nothing held out is ever trained on."""

import re
from itertools import pairwise
from random import Random

import pytest

from dataset.needles import (
    COLOURS,
    MOST_PICTURES,
    WORDS,
    Haystack,
    PictureRow,
    haystack,
    is_held_out,
    picture_row,
    repetition,
    word_counter,
)
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer

TENTHS = [(number + 0.5) / 10 for number in range(10)]
SAID = re.compile(r"The password of the (\w+) (\w+) is (\w+ \w+)\.")


@pytest.fixture(scope="module")
def encode():
    return VLMProcessor(load_tokenizer()).encode


@pytest.fixture(scope="module")
def make(encode):
    count = word_counter(encode)

    def haystack_at(index: int, split: str = "train", length: int = 600, depths=TENTHS, seed: int = 1) -> Haystack:
        return haystack((seed, split, index), length, depths, count)

    return haystack_at


def test_a_text_is_a_pure_function_of_its_place(make):
    assert make(3) == make(3)
    texts = {make(3).text, make(4).text, make(3, "held_out").text, make(3, seed=2).text}
    assert len(texts) == 4


@pytest.mark.parametrize("length", [300, 1024, 4096])
def test_it_has_the_length_and_every_fact_its_depth(make, encode, length):
    """By the tokens of what really stands before each fact."""
    found, longest = make(1, "held_out", length), 30
    total = len(encode(found.text))
    assert length - longest < total <= length
    for fact, wanted, said in zip(found.facts, TENTHS, found.depths, strict=True):
        before = len(encode(found.text[: found.text.index(fact.sentence)])) / total
        assert before == pytest.approx(said, abs=2 / total)
        assert before == pytest.approx(wanted, abs=0.06 if length < 1000 else 0.03)


def test_depths_in_any_order_and_at_the_ends(make):
    found = make(1, depths=[1.0, 0.0, 0.5])
    assert list(found.depths) == sorted(found.depths)
    assert found.text.startswith(found.facts[0].sentence) and found.text.endswith(found.facts[2].sentence)


def test_facts_are_told_apart_by_their_keys_and_said_once(make):
    for index in range(40):
        found = make(index)
        said = SAID.findall(found.text)
        assert [(fact.colour, fact.animal, " ".join(fact.password)) for fact in found.facts] == said
        assert len({(colour, animal) for colour, animal, _ in said}) == len({password for *_, password in said}) == 10
        animals = [animal for _, animal, _ in said]
        assert len(set(animals)) < 10  # the animal alone is no key


def test_the_rest_is_varied_and_speaks_of_the_same_things(make):
    found = make(1, length=4096)
    rest = [sentence for sentence in re.split(r"(?<=\.) ", found.text) if not SAID.fullmatch(sentence)]
    assert len(set(rest)) > 0.97 * len(rest) > 200
    assert all(one != other for one, other in pairwise(rest))
    filler = " ".join(rest)
    assert all(fact.animal in filler for fact in found.facts) and "password" not in filler


def test_what_is_held_out_is_never_trained_on(make):
    trained, held = (
        [fact for index in range(60) for fact in make(index, split).facts] for split in ("train", "held_out")
    )
    assert {is_held_out(fact.colour, fact.animal) for fact in held} == {True}
    assert {is_held_out(fact.colour, fact.animal) for fact in trained} == {False}
    assert not {fact.password for fact in trained} & {fact.password for fact in held}
    for place in (0, 1):  # and yet no word is strange at its place
        words = [{fact.password[place] for fact in facts} for facts in (trained, held)]
        assert words[0] == words[1] == set(WORDS)


def test_a_talk_asks_after_the_text_and_answers_word_for_word(make):
    found = make(1)
    asked = [found.facts[4], found.facts[0]]
    first, answer, second, last = found.talk(asked)
    assert first["content"] == f"{found.text}\n{asked[0].question}" and second["content"] == asked[1].question
    assert [answer["content"], last["content"]] == [fact.sentence for fact in asked]
    assert answer["content"] in found.text and " ".join(asked[0].password) in answer["content"]


def test_a_series_is_said_again_from_one_of_its_words_on():
    assert repetition((1, "train", 0)) == repetition((1, "train", 0)) != repetition((1, "train", 1))
    starts = set()
    for index in range(30):
        question, answer = repetition((1, "train", index))
        series, _, asked = question["content"].partition("\n")
        words, again = series.split(), answer["content"].split()
        assert words[words.index(again[0]) :] == again and asked == f"Say it again from {again[0]} on."
        assert len(set(words)) == len(words) and len(again) >= len(words) / 2
        assert not set(words) & {*WORDS, *COLOURS}  # nothing that could be a pair that is held out
        starts.add(len(words) - len(again))
    assert len(starts) > 8


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "test"}, "split 'test' is neither"),
        ({"depths": [0.1, 0.2]}, "2 facts are too few"),
        ({"length": 100}, "facts take .* tokens, and the text is to have 100"),
    ],
)
def test_what_cannot_be_is_refused(make, changes, reason):
    with pytest.raises(ValueError, match=reason):
        make(1, **changes)


def names(row: PictureRow) -> list[int]:
    return [scene.things[0].concept for scene in row.scenes]


def test_rows_show_one_thing_each_and_never_twice():
    row = picture_row((1, "held_out", 0), MOST_PICTURES)
    assert row == picture_row((1, "held_out", 0), MOST_PICTURES) != picture_row((1, "held_out", 1), MOST_PICTURES)
    assert len(set(names(row))) == MOST_PICTURES == len(row.scenes)
    assert {len(scene.things) for scene in row.scenes} == {1}
    with pytest.raises(ValueError, match="41 pictures: a row has 1 to 40"):
        picture_row((1, "train", 0), MOST_PICTURES + 1)


def test_no_training_row_shows_a_thing_where_a_held_out_one_does():
    shown = {}
    for split in ("train", "held_out"):
        rows = [names(picture_row((1, split, index), 30)) for index in range(8)]
        shown[split] = {(number, concept) for row in rows for number, concept in enumerate(row)}
    assert not shown["train"] & shown["held_out"]
    assert {concept for _, concept in shown["train"]} & {concept for _, concept in shown["held_out"]}


def test_a_row_is_asked_by_number_and_by_thing():
    row, asked = picture_row((1, "train", 0), 12), set()
    for seed in range(8):
        first, answer, second, _ = row.talk([7, 2], Random(seed))
        assert first["content"].startswith("Picture 1: <image>\nPicture 2: <image>\n")
        assert first["content"].count("<image>") == 12 and "<image>" not in second["content"]
        number, thing = re.fullmatch(r"Picture (\d+) shows the (.+)\.", answer["content"]).groups()
        assert number == "7"
        asked.add(first["content"].rpartition("\n")[2])
    assert asked == {"What is in picture 7?", f"Which picture shows the {thing}?"}
