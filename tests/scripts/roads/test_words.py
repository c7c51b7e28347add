"""When a short answer shares a word with a caption, and which kind of thing it names."""

import pytest

from scripts.data import openmoji, stamps
from scripts.roads.words import BROAD, KindOfCaption, broad_kind, content_words, judge

CAPTIONS = [
    ("A brown hen.", "A bird."),
    ("A brown bear.", "A mammal."),
    ("A polar bear.", "A mammal."),
    ("A bear flag.", "A flag."),
    ("Two red cherries.", "A fruit."),
]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Some cherries!", {"cherry"}),
        ("It’s a box of glasses on the bus.", {"box", "glass", "bus"}),
        ("The letter E in 2 colours", {"letter", "colour"}),
        ("A cherry is a fruit, like two strawberries.", {"cherry", "fruit", "strawberry"}),
        ("This is it.", set()),
    ],
)
def test_content_words(caption, words):
    assert content_words(caption) == words


def test_the_nearest_caption_says_the_kind_and_a_stranger_none():
    kind_of = KindOfCaption(CAPTIONS)
    assert kind_of("A hen.") == "A bird."
    assert kind_of("A bear.") == "A mammal."  # three captions are as near, two of them of this kind
    assert kind_of("Cherry red.") == "A fruit."
    assert kind_of("A locomotive.") is None and kind_of("") is None


def test_answers_are_judged_by_mode_and_what_was_not_asked_is_left_out():
    records = [
        {"pictures": ["1.png"], "truth": "A black hen.", "right": "A hen.", "shuffled": None},
        {"pictures": ["2.png"], "truth": "A grizzly.", "right": "A polar bear.", "shuffled": "A hen."},
        {"pictures": ["3.png"], "truth": "Fire!", "right": "A cherry.", "shuffled": "A fire."},
    ]
    kinds = {"1.png": "A bird.", "2.png": "A mammal."}
    report = judge(records, kinds, KindOfCaption(CAPTIONS), ("right", "shuffled"))
    assert [report["right"][what]["share"] for what in report["right"]] == [0.3333, 1.0]
    assert [report["shuffled"][what]["share"] for what in report["shuffled"]] == [0.5, 0.0]
    assert report["right"]["names the kind"]["count"] == 2 and report["right"]["names the kind"]["interval"][1] == 1.0


def test_broad_kinds():
    kinds = {*openmoji.KINDS, *(english for english, _chinese in stamps.KINDS.values())}
    kinds -= {""}
    of = {answer: broad_kind(answer, kinds) for answer in ("A bird.", "A mammal.", "A tool.", "Money.", "", "A hen.")}
    assert list(of.values()) == ["animal", "animal", "thing", "thing", None, None]
    assert set(BROAD) <= kinds
