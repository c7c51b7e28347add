"""Rules for the words of Emoji World: which answer is true of a scene, found without the module's own tables."""

import re

from PIL import Image

from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.emoji_wordings import UNSEEN

# What is said, written out once more: the tests would repeat a mistake in the module's own tables.
PLACES = {
    "en": ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"],
    "zh": ["左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"],
}

NUMBERS = {
    "en": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "zh": list("一两三四五六七八九"),
}

GROUNDS = {  # hue in degrees, or None and brightness
    "white": (None, 250), "grey": (None, 165), "red": (0, None), "orange": (33, None), "yellow": (53, None),
    "green": (113, None), "blue": (214, None), "purple": (275, None),
}  # fmt: skip

CHINESE_GROUNDS = dict(zip(["白色", "灰色", "红色", "橙色", "黄色", "绿色", "蓝色", "紫色"], GROUNDS, strict=True))


def names_of(scene: world.Scene, language: str) -> list[str]:
    return [getattr(world.concepts()[thing.concept], language) for thing in scene.things]


def ground_of(scene: world.Scene) -> str:
    """The English name of the ground's colour, from its pixels alone."""
    high, low = max(scene.rgb), min(scene.rgb)
    if high - low < 25:
        return "white" if high > 210 else "grey"
    hue = Image.new("RGB", (1, 1), scene.rgb).convert("HSV").getpixel((0, 0))[0] * 360 / 256
    distances = {name: abs((hue - h + 180) % 360 - 180) for name, (h, _) in GROUNDS.items() if h is not None}
    return min(distances, key=distances.get)


def fits(wording: str, question: str) -> re.Match | None:
    """The match of a question with a way of asking; its groups are what it is about."""
    pattern = re.escape(wording).replace(r"\{\}", "(.+)").replace(r"\{a\}", "(?:an?|any) (.+)")
    return re.fullmatch(pattern, question)


def subjects_of(kind: str, language: str, question: str) -> list[str]:
    """What a question may be about, by each wording of its kind that it fits: wordings have no truth to be tested."""
    wordings = (*words.QUESTIONS[language][kind], *UNSEEN[language].get(kind, ()))
    matches = [match for wording in wordings if (match := fits(wording, question))]
    assert matches, f"{question!r} is no question of kind {kind}"
    return ["".join(match.groups()) for match in matches]


def check_answer(scene: world.Scene, kind: str, language: str, question: str, answer: str) -> str:
    """Asserts that the answer is true; returns the thing or place asked about."""
    names = names_of(scene, language)
    at = {PLACES[language][thing.place]: name for thing, name in zip(scene.things, names, strict=True)}
    everything = {getattr(concept, language) for concept in world.concepts()}
    known = {"at": set(at), "where": set(names), "yesno": everything}.get(kind, {""})
    [subject] = {subject for subject in subjects_of(kind, language, question) if subject in known}
    where = {name: place for place, name in at.items()}
    if kind == "what":
        assert answer.split({"en": ", ", "zh": "、"}[language]) == names
    elif kind == "at":
        assert answer == at[subject]
    elif kind == "where":
        assert answer == where[subject]
    elif kind == "count":
        assert answer == NUMBERS[language][len(scene.things) - 1]
    elif kind == "colour":
        assert (answer if language == "en" else CHINESE_GROUNDS[answer]) == ground_of(scene)
    else:
        yes, no = {"en": ("yes", "no"), "zh": ("有", "没有")}[language]
        assert answer == (yes if subject in names else no)
    return subject


def check_turns(turns: list[dict]) -> list[tuple[str, str]]:
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert all(set(turn) == {"role", "content"} and turn["content"] for turn in turns)
    contents = [turn["content"] for turn in turns]
    assert "<image>" not in "".join(contents[1:])
    return list(zip(contents[::2], contents[1::2], strict=True))


def language_of(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
