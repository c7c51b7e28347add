"""Emoji World's questions about where, answered with boxes (dataset/boxes.py), in English and Chinese."""

from random import Random

from dataset.emoji_talks import single_questions
from dataset.emoji_words import REMARKS_APART
from dataset.emoji_world import LANGUAGES, Scene, boxes, name

KINDS = ("box", "boxes")  # of one thing, which is named; of each thing, with its name
QUESTIONS = {  # each says that boxes are wanted: "where is the cat?" alone is answered in words
    "en": {
        "box": (
            "Where is the {}? Answer with a box.", "Give the box of the {}.", "Draw a box around the {}.",
            "Find the {} and give its box.", "Show me the box of the {}.", "Which box holds the {}?",
            "Mark the {} with a box.", "What is the bounding box of the {}?", "Where do you see the {}? Give a box.",
            "Please put a box around the {}.", "Tell me the box that the {} is in.", "Can you box the {}?",
            "Locate the {} with a bounding box.", "Look at the picture. In which box is the {}?",
        ),
        "boxes": (
            "Give a box for each thing.", "Draw a box around each thing.", "Name all things with their boxes.",
            "List everything in the picture, each with its box.", "Where is everything? Answer with boxes.",
            "Find all objects and give their boxes.", "Mark every thing with a box.",
            "What do you see? Give a box for each.", "Show me the boxes of all items.",
            "Please put a box around everything.", "Which things are there, and in which boxes?",
            "Tell me the bounding box of each object.",
        ),
    },
    "zh": {
        "box": (
            "{}在哪里？用方框回答。", "给出{}的方框。", "在{}周围画一个框。", "找到{}，给出它的方框。", "请框出{}。",
            "哪个方框里有{}？", "用方框标出{}。", "{}的边界框是什么？", "把{}框起来。", "{}在哪儿？请给一个方框。",
            "告诉我{}的方框。", "能把{}框出来吗？", "用边界框定位{}。", "看看图，{}在哪个框里？",
        ),
        "boxes": (
            "给出每样东西的方框。", "给每样东西画一个框。", "说出所有东西和它们的方框。",
            "列出图里的东西，并给出方框。", "东西都在哪里？用方框回答。", "找出所有物体，给出它们的方框。",
            "用方框标出每样东西。", "你看到了什么？每样给一个方框。", "请框出所有东西。", "把图里的东西都框起来。",
            "有哪些东西，分别在哪个框里？", "告诉我每个物体的边界框。",
        ),
    },
}  # fmt: skip


def ask_box(scene: Scene, number: int, language: str, rng: Random) -> tuple[str, str]:
    """Where the thing of this number in scene.things is, and its box."""
    subject = name(scene.things[number].concept, language)
    return rng.choice(QUESTIONS[language]["box"]).format(subject), str(boxes(scene)[number])


def ask_boxes(scene: Scene, language: str, rng: Random) -> tuple[str, str]:
    """Where all things are: each name with its box, in the order of scene.things."""
    named = (
        f"{name(thing.concept, language)} {box}" for thing, box in zip(scene.things, boxes(scene), strict=True)
    )  # fmt: skip
    return rng.choice(QUESTIONS[language]["boxes"]), REMARKS_APART[language].join(named)


def ask(scene: Scene, kind: str, language: str, rng: Random) -> tuple[str, str]:
    """A question of one of KINDS and its answer."""
    if kind == "boxes":
        return ask_boxes(scene, language, rng)
    return ask_box(scene, rng.randrange(len(scene.things)), language, rng)


def box_conversations(scene: Scene, rng: Random) -> list[list[dict]]:
    """Stage 2's about one picture, each question alone: one about each thing and one about all, in both languages."""
    asked = []
    for language in LANGUAGES:
        asked += [ask_box(scene, number, language, rng) for number in range(len(scene.things))]
        asked.append(ask_boxes(scene, language, rng))
    return single_questions(asked)
