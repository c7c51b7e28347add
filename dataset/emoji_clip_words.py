"""Emoji World's clips in words: what can be asked about one, and exactly answered, in English and Chinese.

Only what needs the order of the frames is asked: each question's answer is another one, or none, for the same clip
backwards. And only the kind `ends` can be answered from one frame, if one knows which it is.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from random import Random

from dataset.emoji_clips import FRAMES, RATE, STILL, Clip, shown
from dataset.emoji_talks import single_questions, telling
from dataset.emoji_words import NAMES_APART, PLACES, REMARKS_APART
from dataset.emoji_world import LANGUAGES, name
from model.video import time_labels

TAG = "<video>"
LABELS = time_labels([(frame + 0.5) / RATE for frame in range(FRAMES)])  # what stands before each frame in the prompt
KINDS = ("in", "out", "after", "way", "count", "story", "ends")
KIND_WEIGHTS = dict(zip(KINDS, (4, 4, 4, 3, 2, 1, 2), strict=True))
SEEN_MOVING = 4  # frames, at the least, of a thing whose way is asked
NUMBERS = {"en": ("none", "one", "two", "three"), "zh": ("没有", "一样", "两样", "三样")}
WAY_NAMES = {"en": ("left", "right", "up", "down"), "zh": ("向左", "向右", "向上", "向下")}
NOTHING = {"en": "nothing", "zh": "什么都没有"}
COMES, LEAVES = {"en": "{} comes", "zh": "{}来了"}, {"en": "{} leaves", "zh": "{}走了"}
ORDERS = {"first": {"en": ("first",), "zh": ("最先", "最早")}, "last": {"en": ("last",), "zh": ("最后",)}}
SIDES = {
    "start": {"en": ("beginning", "start"), "zh": ("开始", "开头")},
    "end": {"en": ("end",), "zh": ("最后", "结尾")},
}
VERBS = {
    "in": {"en": ("came in", "appeared"), "zh": ("出现", "进来")},
    "out": {"en": ("left", "disappeared"), "zh": ("离开", "消失")},
}
BEFORE_AFTER = {
    "before": {"en": ("before",), "zh": ("之前", "前面")},
    "after": {"en": ("after",), "zh": ("之后", "后面")},
}
# {0}: first or last, after or before, beginning or end, or what things did; {1}: the name of a thing.
QUESTIONS = {
    "en": {
        "in": (
            "What came in {0}?", "Which thing came in {0}?", "What appeared {0}?", "Which thing appeared {0}?",
            "Tell me what came in {0}.", "Name the thing that came in {0}.", "Which object arrived {0}?",
            "Of the things that came in, which was {0}?", "Watch the video. What came in {0}?",
            "What was the {0} thing to come in?",
        ),
        "out": (
            "What left {0}?", "Which thing left {0}?", "What disappeared {0}?", "Which thing was {0} to leave?",
            "Tell me what left {0}.", "Name the thing that left {0}.", "Of the things that left, which was {0}?",
            "Watch the video. What left {0}?", "Which object went away {0}?", "What was the {0} thing to go?",
        ),
        "after": (
            "What came in {0} the {1}?", "Which thing came in {0} the {1}?", "What appeared {0} the {1}?",
            "Tell me what came in {0} the {1}.", "Name what came in right {0} the {1}.",
            "Watch the video. What came in {0} the {1}?", "Which object arrived {0} the {1}?",
            "Right {0} the {1}, what came in?",
        ),
        "way": (
            "Which way does the {1} go?", "Where does the {1} move?", "In which direction does the {1} move?",
            "Which way is the {1} moving?", "Tell me which way the {1} goes.", "What is the direction of the {1}?",
            "Watch the {1}. Which way does it go?", "Does the {1} go left, right, up or down?",
        ),
        "count": (
            "How many things {0}?", "Count the things that {0}.", "Tell me how many things {0}.",
            "What is the number of things that {0}?", "In the video, how many objects {0}?",
            "Watch the video. How many things {0}?",
        ),
        "story": (
            "What happens in the video?", "Tell the story of the video.", "What happens, and in which order?",
            "Describe the video.", "Say what happens, step by step.", "Tell me what you see happen.",
        ),
        "ends": (
            "What is there at the {0}?", "Which things are there at the {0}?", "What does the {0} of the video show?",
            "What do you see at the {0}?", "Name what is there at the {0}.", "Tell me what is there at the {0}.",
        ),
    },
    "zh": {
        "in": ("{0}进来的是什么？", "{0}出现的是什么？", "什么{0}进来？", "什么东西{0}出现？", "说出{0}进来的东西。",
               "告诉我{0}出现的是什么。", "看视频，{0}进来的是什么？", "哪样东西{0}出现？"),
        "out": ("{0}离开的是什么？", "{0}消失的是什么？", "什么{0}离开？", "什么东西{0}消失？", "说出{0}离开的东西。",
                "告诉我{0}消失的是什么。", "看视频，{0}离开的是什么？", "哪样东西{0}离开？"),
        "after": ("{1}{0}进来的是什么？", "{1}{0}出现的是什么？", "在{1}{0}进来的是什么？", "告诉我{1}{0}出现了什么。",
                  "看视频，{1}{0}进来的是什么？", "紧挨着{1}{0}出现的是什么？"),
        "way": ("{1}往哪边走？", "{1}向哪个方向移动？", "{1}朝哪边动？", "告诉我{1}往哪边走。",
                "看视频，{1}往哪里移动？", "{1}是向左、向右、向上还是向下？"),
        "count": ("有几样东西{0}了？", "{0}了几样东西？", "数一数{0}了几样东西。", "告诉我有多少东西{0}了。",
                  "看视频，一共{0}了几样东西？"),
        "story": ("视频里发生了什么？", "讲讲视频的内容。", "按顺序说说发生了什么。", "描述这个视频。",
                  "一步一步说出发生的事。"),
        "ends": ("{0}有什么？", "视频{0}有什么东西？", "{0}能看到什么？", "说出{0}有的东西。", "告诉我{0}有什么。"),
    },
}  # fmt: skip
LOG_REQUESTS = {
    "en": ("What is where at each time?", "List what each frame shows, and where.", "Say for each time what is where."),
    "zh": ("每个时间哪里有什么？", "列出每一帧的东西和位置。", "说说每个时刻什么在哪里。"),
}
ROLL_CALLS = {
    "en": ("From when to when is each thing there, and which way does it go?", "Say of each thing when and which way.",
           "Which things are there, from when to when, and where do they go?"),
    "zh": ("每样东西从什么时候到什么时候在，往哪边走？", "说说每样东西的时间和方向。",
           "有哪些东西，各在什么时间，往哪里走？"),
}  # fmt: skip
STAYS = {"en": "still", "zh": "不动"}
Key = tuple[str, Hashable]  # a kind, and what of it is asked: first or last; a way's concept; ("after", concept)


def facts(clip: Clip) -> dict[Key, Hashable]:
    """What can be asked of a clip, and the answers in no language: concepts, their tuples, ways, numbers, events."""
    comers, leavers = clip.comers(), clip.leavers()
    found: dict[Key, Hashable] = {}
    for kind, actors in (("in", comers), ("out", leavers)):
        found["count", kind] = len(actors)
        if actors:
            found[kind, "first"], found[kind, "last"] = actors[0].concept, actors[-1].concept
    came = [None, *(actor.concept for actor in comers), None]
    for before, concept, after in zip(came, came[1:], came[2:], strict=False):
        found["after", ("before", concept)], found["after", ("after", concept)] = before, after
    for actor in clip.actors:
        if actor.way != STILL and actor.leaves - actor.comes >= SEEN_MOVING:
            found["way", actor.concept] = actor.way
    for side, frame in (("start", 0), ("end", FRAMES - 1)):
        if there := shown(clip.there(frame)):
            found["ends", side] = there
    if events := story(clip):
        found["story", ""] = (shown(clip.there(0)), events)
    return found


def story(clip: Clip) -> tuple[tuple[bool, int], ...]:
    """Whether something comes, or leaves, and what, in order."""
    events = [(actor.comes, True, actor.concept) for actor in clip.comers()]
    events += [(actor.leaves, False, actor.concept) for actor in clip.leavers()]
    return tuple((comes, concept) for _, comes, concept in sorted(events))


def askable(clip: Clip) -> dict[Key, Hashable]:
    """The facts that need the order of the frames: the clip backwards has them otherwise.

    One that it has not at all is not asked either: that it is asked would tell which of the two clips this is.
    """
    backwards = facts(clip.backwards())
    return {key: fact for key, fact in facts(clip).items() if backwards.get(key, fact) != fact}


def ask(key: Key, fact: Hashable, language: str, rng: Random) -> tuple[str, str]:
    """A question in words, and its answer."""
    kind, about = key
    said = subject = ""
    if kind in ("in", "out"):
        said = rng.choice(ORDERS[about][language])
    elif kind == "after":
        said, subject = rng.choice(BEFORE_AFTER[about[0]][language]), name(about[1], language)
    elif kind == "way":
        subject = name(about, language)
    elif kind == "count":
        said = rng.choice(VERBS[about][language])
    elif kind == "ends":
        said = rng.choice(SIDES[about][language])
    return rng.choice(QUESTIONS[language][kind]).format(said, subject), answer_in_words(kind, fact, language)


def answer_in_words(kind: str, fact: Hashable, language: str) -> str:
    if kind == "count":
        return NUMBERS[language][fact]
    if kind == "way":
        return WAY_NAMES[language][fact]
    if kind == "ends":
        return names_of(fact, language)
    if kind == "story":
        there, events = fact
        told = [(COMES if comes else LEAVES)[language].format(name(concept, language)) for comes, concept in events]
        return REMARKS_APART[language].join([names_of(there, language), *told])
    return NOTHING[language] if fact is None else name(fact, language)


def names_of(concepts: Sequence[int], language: str) -> str:
    return NAMES_APART[language].join(name(concept, language) for concept in concepts) or NOTHING[language]


def log(clip: Clip, language: str) -> str:
    """What each frame shows and where, under the label that stands before it in the prompt."""
    space, end = ("", "；") if language == "zh" else (" ", "; ")
    told = []
    for frame, label in enumerate(LABELS):
        things = [name(t.concept, language) + space + PLACES[language][t.place] for t in clip.there(frame)]
        told.append(label + space + (NAMES_APART[language].join(things) or NOTHING[language]))
    return end.join(told)


def log_conversation(clip: Clip, rng: Random) -> list[dict]:
    """Frame by frame, which is how a model learns to tell one frame from the next; with places, to see what moves."""
    return telling(LOG_REQUESTS, partial(log, clip), rng, TAG)


def roll_call(clip: Clip, language: str) -> str:
    """Of each thing the first time at which it is seen, the last, and its way, right behind its name.

    A single question names a thing, and is answered some words later: the look that must be taken at the name is of no
    use until its outcome is carried there, and neither is learnt without the other (emoji_talks.roll_call).
    """
    told = []
    for actor in sorted(clip.actors, key=lambda actor: (actor.comes, actor.x)):
        way = STAYS[language] if actor.way == STILL else WAY_NAMES[language][actor.way]
        told.append(f"{name(actor.concept, language)} {LABELS[actor.comes]} {LABELS[actor.leaves - 1]} {way}")
    return REMARKS_APART[language].join(told)


def roll_call_conversation(clip: Clip, rng: Random) -> list[dict]:
    return telling(ROLL_CALLS, partial(roll_call, clip), rng, TAG)


def question_conversations(clip: Clip, rng: Random, count: int) -> list[list[dict]]:
    """Conversations about one clip: `count` questions at most, each alone, the roll call, and the log."""
    possible = askable(clip)
    keys = list(possible)
    chosen = rng.choices(keys, _weights(keys), k=count) if keys else []
    pairs = [ask(key, possible[key], rng.choice(LANGUAGES), rng) for key in chosen]
    return [*single_questions(pairs, TAG), roll_call_conversation(clip, rng), log_conversation(clip, rng)]


def _weights(keys: Sequence[Key]) -> list[float]:
    """So that kinds are asked as KIND_WEIGHTS says, however many questions of a kind there are."""
    kinds = [kind for kind, _ in keys]
    return [KIND_WEIGHTS[kind] / kinds.count(kind) for kind in kinds]
