"""Rules for the words of Emoji World: which answer is true of a scene, found without the module's own tables."""

import re

from PIL import Image

from dataset import emoji_world as world

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

QUESTIONS = {
    "en": {
        "what": "What is in the picture|What do you see", "at": "What is at the (.+)|Which thing is at the (.+)",
        "where": "Where is the (.+)|In which place is the (.+)",
        "count": "How many things are there|How many things do you see",
        "colour": "What colour is the ground|Which colour is behind the things",
        "yesno": "Is there any (.+)|Do you see any (.+)",
    },
    "zh": {
        "what": "图中有什么|你看到了什么", "at": "(.+)是什么|(.+)有什么", "where": "(.+)在哪里|(.+)在什么位置",
        "count": "有几样东西|一共有多少样东西", "colour": "背景是什么颜色|东西后面是什么颜色",
        "yesno": "有(.+)吗|你看到(.+)了吗",
    },
}  # fmt: skip


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


def check_answer(scene: world.Scene, kind: str, language: str, question: str, answer: str) -> str:
    """Asserts that the answer is true; returns the thing or place asked about."""
    mark = {"en": r"\?", "zh": "？"}[language]
    match = re.fullmatch(f"(?:{QUESTIONS[language][kind]}){mark}", question)
    assert match, f"{question!r} is no question of kind {kind}"
    subject = "".join(group or "" for group in match.groups())
    names = names_of(scene, language)
    at = {PLACES[language][thing.place]: name for thing, name in zip(scene.things, names, strict=True)}
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
        assert subject in names or subject in {getattr(concept, language) for concept in world.concepts()}
    return subject


def check_turns(turns: list[dict]) -> list[tuple[str, str]]:
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert all(set(turn) == {"role", "content"} and turn["content"] for turn in turns)
    contents = [turn["content"] for turn in turns]
    assert "<image>" not in "".join(contents[1:])
    return list(zip(contents[::2], contents[1::2], strict=True))


def language_of(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
