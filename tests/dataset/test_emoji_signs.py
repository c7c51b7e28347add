"""Fine print: scenes that repeat, signs that are apart, splits that share no pair of colour and text, exact answers."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from PIL import Image, ImageChops

from dataset import emoji_sign_words as words
from dataset import emoji_signs as signs
from dataset import emoji_world as world
from helpers.emoji import NUMBERS, PLACES, check_answer, language_of
from model.messages import UserError
from model.tokenizer_files import load_tokenizer

# What is said, written out once more: the tests would repeat a mistake in the module's own tables.
COLOURS = {
    "white": (255, 255, 255), "red": (185, 25, 35), "yellow": (255, 205, 0), "green": (0, 105, 55),
    "blue": (15, 60, 165),
}  # fmt: skip
CHINESE = dict(zip(["白色", "红色", "黄色", "绿色", "蓝色"], COLOURS, strict=True))


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[signs.SignScene]]:
    return {
        split: [signs.sample_sign_scene(5, split, index, 128) for index in range(1000)]
        for split in ("train", "held_out")
    }


def colour_of(picture: Image.Image, box: signs.Corners) -> str:
    """The name of a board's colour, from its pixels alone: between border and letters it is plain."""
    found = picture.getpixel((box[0] + 12, (box[1] + box[3]) // 2))
    return next(name for name, rgb in COLOURS.items() if rgb == found)


def changed(a: Image.Image, b: Image.Image) -> signs.Corners:
    return ImageChops.difference(a, b).getbbox()


def inside(box: signs.Corners, outer: signs.Corners) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


# Scenes


def test_scenes_and_pictures_repeat():
    for split in ("train", "held_out"):
        scene = signs.sample_sign_scene(7, split, 3)
        picture = signs.render(scene).tobytes()
        signs._font.cache_clear()
        assert signs.sample_sign_scene(7, split, 3) == scene
        assert signs.render(scene).tobytes() == picture
    numbers = [(seed, split, index) for seed in (0, 1, 10) for split in ("train", "held_out") for index in range(50)]
    assert len({signs.sample_sign_scene(*number) for number in numbers}) == 300


def test_what_cannot_be_sampled():
    with pytest.raises(ValueError, match="'test' is neither 'train' nor 'held_out'"):
        signs.sample_sign_scene(0, "test", 0)
    with pytest.raises(UserError, match="63 concepts are too few"):
        signs.sample_sign_scene(0, "train", 0, vocabulary=63)


def test_all_is_apart_and_inside_the_picture(scenes):
    for scene in scenes["train"] + scenes["held_out"]:
        boxes = [*map(world.square_of, scene.things), *(sign.box for sign in scene.signs)]
        assert all(inside(box, (10, 10, 886, 886)) for box in boxes)
        for a, b in combinations(boxes, 2):
            across, down = max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])
            assert max(across, down) >= 10  # pixels between them
        for thing in scene.things:
            column, row = thing.x / (896 / 3), thing.y / (896 / 3)
            assert (int(column), int(row)) == (thing.place % 3, thing.place // 3)
            assert all(0.13 < part % 1 < 0.87 for part in (column, row))  # clearly in that place
        places = [thing.place for thing in scene.things]
        assert places == sorted(set(places))


def test_signs_stand_anywhere(scenes):
    """Their edges know no grid: of 224 px, as tiles are cut, or any other."""
    for side in (0, 1):
        starts = Counter(sign.box[side] % 224 // 28 for scene in scenes["train"] for sign in scene.signs)
        assert len(starts) == 8 and max(starts.values()) < 1.6 * min(starts.values())


def test_numbers_colours_and_texts_are_balanced(scenes):
    for split, sampled in scenes.items():
        assert min(Counter(len(scene.signs) for scene in sampled).values()) > 270
        assert set(Counter(len(scene.signs) for scene in sampled)) == {2, 3, 4}
        assert {len(scene.things) for scene in sampled} == {2, 3, 4}
        all_signs = [sign for scene in sampled for sign in scene.signs]
        colours = Counter(sign.colour for sign in all_signs)
        assert len(colours) == 5 and max(colours.values()) < 1.3 * min(colours.values())
        numbers = sum(sign.text.isdigit() for sign in all_signs)
        assert abs(numbers / len(all_signs) - 0.5) < 0.02
        for length in (2, 3, 4):  # so that the number of signs tells nothing of what stands there
            of_length = [sign for scene in sampled if len(scene.signs) == length for sign in scene.signs]
            assert abs(sum(sign.text.isdigit() for sign in of_length) / len(of_length) - 0.5) < 0.05
        for scene in sampled:
            assert len({sign.colour for sign in scene.signs}) == len({sign.text for sign in scene.signs})
            assert len({sign.colour for sign in scene.signs}) == len(scene.signs)
            assert scene.ground not in {sign.colour for sign in scene.signs}
            assert {words.kind_of(sign) for sign in scene.signs} == {"word", "number"}
        texts = Counter(sign.text for sign in all_signs)
        if split == "train":
            assert set(texts) == {*signs.WORDS, *signs.NUMBERS}
            assert min(texts[word] for word in signs.WORDS) > 15


def test_no_pair_of_colour_and_text_and_none_of_things_is_in_both_splits(scenes):
    texts, things = {}, {}
    for split, sampled in scenes.items():
        texts[split] = {(sign.colour, sign.text) for scene in sampled for sign in scene.signs}
        chosen = [sorted(thing.concept for thing in scene.things) for scene in sampled]
        things[split] = {pair for concepts in chosen for pair in combinations(concepts, 2)}
    assert not texts["train"] & texts["held_out"] and not things["train"] & things["held_out"]
    assert len(texts["held_out"]) > 70 and max(Counter(text for _, text in texts["held_out"]).values()) == 1
    for first in range(1, 10):  # a colour does not tell a number by its first digit either
        assert len({colour for colour, text in texts["train"] if text[0] == str(first)}) == 5


# Texts


def test_words_are_short_and_differ_by_more_than_a_letter():
    assert len(set(signs.WORDS)) == 40 and len(signs.NUMBERS) == 90
    assert all(re.fullmatch("[A-Z]{3,5}", word) for word in signs.WORDS)
    for a, b in combinations(signs.WORDS, 2):
        assert len(a) != len(b) or sum(x != y for x, y in zip(a, b, strict=True)) >= 2


def test_a_text_is_one_token_a_letter_alone_and_in_a_sentence():
    tokenizer = load_tokenizer()
    for text in (*signs.WORDS, *signs.NUMBERS):
        letters = tokenizer.convert_tokens_to_ids(list(text))
        for sentence in (text, f'Which sign says "{text}"?', f"“{text}”写在哪块牌子上？"):
            ids = tokenizer.encode(sentence, add_special_tokens=False)
            assert any(ids[start : start + len(letters)] == letters for start in range(len(ids))), sentence


# Pictures


def test_a_sign_or_thing_less_changes_its_rectangle_alone(scenes):
    for scene in scenes["train"][:6] + scenes["held_out"][:6]:
        picture = signs.render(scene)
        assert (picture.size, picture.mode) == ((896, 896), "RGB")
        for number, sign in enumerate(scene.signs):
            others = scene.signs[:number] + scene.signs[number + 1 :]
            assert changed(picture, signs.render(replace(scene, signs=others))) == sign.box
        for number, thing in enumerate(scene.things):
            others = scene.things[:number] + scene.things[number + 1 :]
            assert inside(changed(picture, signs.render(replace(scene, things=others))), world.square_of(thing))


def test_every_text_stands_in_the_middle_of_the_smallest_board():
    box = (100, 100, 290, 170)
    empty = signs.Sign("", 0, box, 44)
    scene = signs.SignScene(1, (165, 165, 165), (), (empty,))
    blank, drawn = signs.render(scene), set()
    for text in (*signs.WORDS, *signs.NUMBERS):
        picture = signs.render(replace(scene, signs=(replace(empty, text=text),)))
        found = changed(blank, picture)
        assert inside(found, (112, 112, 278, 158)) and found[3] - found[1] >= 28, text  # 12 px from the edge
        assert abs(found[0] + found[2] - 390) <= 8 and abs(found[1] + found[3] - 270) <= 12, text
        drawn.add(picture.tobytes())
    assert len(drawn) == 130


def test_no_text_is_cut_in_a_close_up(scenes):
    """By what is missing in the picture when a text is: all of it, or nothing."""
    for index, scene in enumerate(scenes["train"][:12] + scenes["held_out"][:12]):
        close_up = signs.sample_close_up(scene, Random(index))
        assert close_up == signs.sample_close_up(scene, Random(index)) and close_up.signs
        left, top = close_up.left, close_up.top
        picture, corners = signs.render(scene), (left, top, left + 224, top + 224)
        near = signs.render_close_up(scene, close_up)
        assert near.size == (224, 224) and near.tobytes() == picture.crop(corners).tobytes()
        for number, sign in enumerate(scene.signs):
            others = scene.signs[:number] + (replace(sign, text=""),) + scene.signs[number + 1 :]
            missing = changed(picture, signs.render(replace(scene, signs=others)))
            assert inside(missing, signs.text_box(sign)) and inside(signs.text_box(sign), sign.box)
            if sign in close_up.signs:
                assert inside(missing, corners)
            else:
                assert missing[0] >= corners[2] or missing[2] <= left or missing[1] >= corners[3] or missing[3] <= top


def test_close_ups_are_taken_anywhere_around_a_sign(scenes):
    taken = [signs.sample_close_up(scene, Random(index)) for index, scene in enumerate(scenes["train"])]
    assert all(0 <= edge <= 896 - 224 for close_up in taken for edge in (close_up.left, close_up.top))
    assert Counter(len(close_up.signs) for close_up in taken)[2] > 20
    cut = sum(sign.box[0] < close_up.left for close_up in taken for sign in close_up.signs)
    assert 100 < cut < 900  # boards that begin outside, as they do in tiles


def test_letters_are_of_high_contrast():
    """By WCAG's measure, which asks for 4.5 of small text."""

    def luminance(rgb: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for board, letters in signs.BOARDS.values():
        low, high = sorted(map(luminance, (board, letters)))
        assert (high + 0.05) / (low + 0.05) > 6


# Words


def check_sign_answer(scene: signs.SignScene, kind: str, language: str, question: str, answer: str) -> None:
    """Asserts that the answer is true, by what the picture shows."""
    picture = signs.render(scene)
    said = {colour_of(picture, sign.box): sign.text for sign in scene.signs}
    names = {"en": dict(zip(COLOURS, COLOURS, strict=True)), "zh": CHINESE}[language]
    if kind == "signs":
        assert answer == NUMBERS[language][len(scene.signs) - 1]
    elif kind == "which":
        [text] = re.findall('["“]([A-Z0-9]+)["”]', question)
        assert said[names[answer]] == text
    else:
        [colour] = [name for name in names if name in question]
        assert answer == said[names[colour]] and answer.isdigit() == (kind == "number")


def test_answers_are_exact(scenes):
    asked = Counter()
    for index, scene in enumerate(scenes["train"][:30] + scenes["held_out"][:30]):
        rng = Random(index)
        for language in world.LANGUAGES:
            for kind in words.KINDS:
                question, answer = words.ask(scene, kind, language, rng, 128)
                assert language_of(question) == language
                check = check_sign_answer if kind in words.SIGN_KINDS else check_answer
                check(scene, kind, language, question, answer)
                asked[kind, language] += 1
    assert len(asked) == 12 and set(asked.values()) == {60}


def test_a_caption_tells_every_thing_and_every_sign(scenes):
    for scene in scenes["train"][:10]:
        picture = signs.render(scene)
        said = [(colour_of(picture, sign.box), sign.text) for sign in scene.signs]
        english, chinese = (words.caption(scene, language) for language in ("en", "zh"))
        assert re.findall('([a-z]+) says "([A-Z0-9]+)"', english) == said
        found = re.findall("([\u4e00-\u9fff]+)写着“([A-Z0-9]+)”", chinese)
        assert [(CHINESE[colour], text) for colour, text in found] == said
        assert f"{NUMBERS['zh'][len(said) - 1]}块牌子" in chinese
        assert f"{NUMBERS['en'][len(said) - 1].capitalize()} signs: " in english
        for thing in scene.things:
            concept = world.concepts()[thing.concept]
            assert f"{concept.en} at the {PLACES['en'][thing.place]}" in english
            assert f"{PLACES['zh'][thing.place]}是{concept.zh}" in chinese


def test_every_sign_is_read_in_both_languages_and_looked_for(scenes):
    for index, scene in enumerate(scenes["train"][:50]):
        talks = words.question_conversations(scene, Random(index), 128)
        assert all(len(talk) == 2 and talk[0]["content"].startswith("<image>\n") for talk in talks)
        read = Counter(
            (talk[1]["content"], language_of(talk[0]["content"])) for talk in talks[:-1]
            if re.fullmatch("[A-Z]{3,5}|[0-9]{2}", talk[1]["content"])
        )  # fmt: skip
        assert read == {(sign.text, language): 1 for sign in scene.signs for language in ("en", "zh")}
        asked = " ".join(talk[0]["content"] for talk in talks)
        assert sorted(re.findall('["“]([A-Z0-9]+)["”]', asked)) == sorted(sign.text for sign in scene.signs)


def test_a_close_up_is_asked_about_its_signs_alone(scenes):
    for index, scene in enumerate(scenes["train"][:40]):
        seen = signs.sample_close_up(scene, Random(index)).signs
        talks = words.close_up_conversations(scene, seen, Random(index))
        asked = " ".join(talk[0]["content"] for talk in talks[:-1])
        assert sorted(re.findall('["“]([A-Z0-9]+)["”]', asked)) == sorted(sign.text for sign in seen)
        read = Counter(talk[1]["content"] for talk in talks[:-1])
        assert all(read[sign.text] == 2 for sign in seen) and len(talks) == 3 * len(seen) + 1
        for told in (talks[-1], words.told_conversation(seen, Random(index))):
            said, language = told[1]["content"], language_of(told[0]["content"])
            assert said == words.told(seen, language) and language_of(said) == language
            assert sorted(re.findall('["“]([A-Z0-9]+)["”]', said)) == sorted(sign.text for sign in seen)
    assert words.told(seen[:1], "en").startswith("One sign: ")


def test_half_of_yes_or_no_is_no(scenes):
    answers = Counter(
        words.ask(scene, "yesno", "en", Random(index), 128)[1] for index, scene in enumerate(scenes["train"][:400])
    )
    assert set(answers) == {"yes", "no"} and min(answers.values()) > 160
