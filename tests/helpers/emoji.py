"""Rules for the words of Emoji World: which answer is true of a scene, found without the module's own tables."""

import re
from collections.abc import Iterator

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


def lone_neighbour(scene: world.Scene, name: str, direction: str, language: str) -> str:
    """The name of the one thing in that direction of another; asserts that there is one alone."""
    steps = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1),
             "左边": (-1, 0), "右边": (1, 0), "上面": (0, -1), "下面": (0, 1)}  # fmt: skip
    right, down = steps[direction]
    places = {other: thing.place for thing, other in zip(scene.things, names_of(scene, language), strict=True)}
    ahead = [
        other for other, place in places.items()
        if right * (place % 3 - places[name] % 3) + down * (place // 3 - places[name] // 3) > 0
    ]  # fmt: skip
    assert len(ahead) == 1, f"{direction} {name!r} are {ahead}"
    return ahead[0]


WAYS = "(left of|right of|above|below|左边|右边|上面|下面)"


def _parts(kind: str, language: str, question: str) -> Iterator[tuple[str, str]]:
    """The two things, or direction and thing, that a question of the kind is about, by each wording that it fits."""
    for wording in words.QUESTIONS[language][kind]:
        numbered = wording if "{0}" in wording else wording.replace("{}", "{0}", 1).replace("{}", "{1}")
        first = WAYS if kind == "beside" else "(.+)"
        pattern = re.escape(numbered).replace(r"\{0\}", first).replace(r"\{1\}", "(.+)")
        if match := re.fullmatch(pattern, question):
            yield match.groups() if numbered.index("{0}") < numbered.index("{1}") else match.groups()[::-1]


def relation_of(scene: world.Scene, language: str, question: str) -> tuple[str, ...]:
    """("beside", direction, thing) or ("larger", thing, thing), if the question is one about things of this scene."""
    names = set(names_of(scene, language))
    found = [("beside", *parts) for parts in _parts("beside", language, question) if parts[1] in names]
    found += [("larger", *parts) for parts in _parts("larger", language, question) if set(parts) <= names]
    return found[0] if found else ()


def check_relation(scene: world.Scene, language: str, question: str, answer: str) -> str:
    """Asserts that the answer is the only true one; returns the kind."""
    assert (parts := relation_of(scene, language, question)), f"{question!r}: none in {names_of(scene, language)}"
    kind, first, second = parts
    if kind == "beside":
        assert answer == lone_neighbour(scene, second, first, language)
    else:
        sizes = dict(zip(names_of(scene, language), (thing.size for thing in scene.things), strict=True))
        larger, smaller = sorted((first, second), key=sizes.get, reverse=True)
        assert answer == larger and sizes[larger] > 1.25 * sizes[smaller]
    return kind


def check_roll_call(scene: world.Scene, language: str, called: str, answer: str) -> tuple[int, int]:
    """Asserts that the answer says of each name called where it is, or no; returns how many are there, and are not."""
    between, space, no = {"en": (", ", " ", "no"), "zh": ("、", "", "没有")}[language]
    at = {
        name: PLACES[language][thing.place] for name, thing in zip(names_of(scene, language), scene.things, strict=True)
    }
    subjects = called.split(between)
    assert len(set(subjects)) == len(subjects)
    expected = [f"{subject}{space}{at.get(subject, no)}" for subject in subjects]
    assert answer.split({"en": ", ", "zh": "，"}[language]) == expected
    there = sum(subject in at for subject in subjects)
    return there, len(subjects) - there


def check_talk(scene: world.Scene, kind: str, language: str, pairs: list[tuple[str, str]]) -> None:
    """Asserts that both answers of two turns are true, the second of what the first has named."""
    (opening, first), (follow, second) = pairs
    names = names_of(scene, language)
    if kind == "what":
        check_answer(scene, "count", language, opening, first)
        assert second.split({"en": ", ", "zh": "、"}[language]) == names
        return
    asked = {"where": ("yesno",), "beside": ("where", "at")}[kind]
    for possible in asked:
        try:
            subject = check_answer(scene, possible, language, opening, first)
        except (AssertionError, KeyError, ValueError):
            continue
        break
    else:
        raise AssertionError(f"{opening!r} {first!r} is true of none of {asked}")
    named = first if possible == "at" else subject
    assert named in names and not any(name in re.split(r"[^a-z]", follow) for name in names)  # it is not said again
    if kind == "where":
        assert second == PLACES[language][scene.things[names.index(named)].place]
    else:
        [direction] = re.findall("left of|right of|above|below|左边|右边|上面|下面", follow)
        assert second == lone_neighbour(scene, named, direction, language)


def check_pair(scenes: list[world.Scene], language: str, question: str, answer: str) -> str:
    """Asserts that the answer is the only true one of two pictures; returns both, which or what."""
    names = [names_of(scene, language) for scene in scenes]
    ordinals = {"en": ["first", "second"], "zh": ["第一张", "第二张"]}[language]
    told = [number for number, ordinal in enumerate(ordinals) if ordinal in question]
    if told:
        assert answer.split({"en": ", ", "zh": "、"}[language]) == names[told[0]]
        return "what"
    patterns = {"en": "Which picture shows the (.+)\\?|In which picture is the (.+)\\?",
                "zh": "哪张图里有(.+)？|(.+)在哪张图里？"}  # fmt: skip
    if match := re.fullmatch(patterns[language], question):
        subject = "".join(filter(None, match.groups()))
        assert [ordinal for ordinal, listed in zip(ordinals, names, strict=True) if subject in listed] == [answer]
        return "which"
    assert question in {"What is in both pictures?", "Which thing do both pictures show?", "两张图里都有什么？",
                        "哪样东西两张图都有？"}  # fmt: skip
    assert {answer} == set(names[0]) & set(names[1])
    return "both"
