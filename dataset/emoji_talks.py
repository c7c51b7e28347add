"""What the stages read about Emoji World: conversations about a scene, about two, and about scenes in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import Random

from dataset.emoji_words import (
    CAPTION_REQUESTS,
    DIRECTIONS,
    KINDS,
    NAMES_APART,
    PLACES,
    QUESTIONS,
    RELATIONS,
    REMARKS_APART,
    YES_NO,
    absent,
    ask,
    askable,
    caption,
    list_of_names,
    neighbours,
    notes,
)
from dataset.emoji_world import LANGUAGES, Scene, concepts, frequencies, name

BEHIND = 0.1  # of the pictures: such a question shares no row with the others, and costs as much as all of these
KIND_WEIGHTS = dict(zip(KINDS, (2, 4, 4, 1, 1, 4), strict=True))  # looking a thing up is harder to learn
RELATION_WEIGHTS = dict(zip(RELATIONS, (4, 2), strict=True))
TALK = 3  # questions of the one conversation of each scene that has several
TAG = "<image>"
ORDINALS = {"en": ("first", "second"), "zh": ("第一张", "第二张")}
PAIR_KINDS = ("both", "which")
PAIR_WEIGHTS = {"both": 2, "which": 2, "what": 1}
PAIR_QUESTIONS = {
    "en": {
        "both": ("What is in both pictures?", "Which thing do both pictures show?"),
        "which": ("Which picture shows the {}?", "In which picture is the {}?"),
        "what": ("What is in the {} picture?", "What does the {} picture show?"),
    },
    "zh": {
        "both": ("两张图里都有什么？", "哪样东西两张图都有？"),
        "which": ("哪张图里有{}？", "{}在哪张图里？"),
        "what": ("{}图里有什么？", "{}图中有什么东西？"),
    },
}
FOLLOW_UPS = {  # by what the turn before was about: the thing is not named again
    "en": {"beside": ("And what is {} it?", "What is {} that?"), "where": ("And where is it?", "Where is that?"),
           "what": ("And what are they?", "Which are they?")},
    "zh": {"beside": ("它的{}是什么？", "那它{}呢？"), "where": ("它在哪里？", "那它在哪儿？"),
           "what": ("都是什么？", "分别是什么？")},
}  # fmt: skip
ROLL_CALLS = {
    "en": ("Where is each of these: {}?", "Look for these: {}.", "Which of these are there, and where: {}?"),
    "zh": ("这些东西在哪里：{}？", "找一找：{}。", "哪些在图里，在哪里：{}？"),
}
MOST_CALLED = 10  # names in one of them


def conversation(pairs: Iterable[tuple[str, str]], context: str = "") -> list[dict]:
    """Messages of questions and answers, after a context that the first question stands under."""
    messages = []
    for question, answer in pairs:
        content = f"{context}\n{question}" if context and not messages else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def single_questions(pairs: Iterable[tuple[str, str]], context: str = TAG) -> list[list[dict]]:
    """A conversation for each question, none twice: what was asked before it can tell nothing of its answer."""
    return [conversation([pair], context) for pair in dict.fromkeys(pairs)]


def telling(
    requests: Mapping[str, Sequence[str]], tell: Callable[[str], str], rng: Random, context: str = TAG
) -> list[dict]:  # fmt: skip
    """One of the requests of a language, by chance, and what is told in it. tell: gives that for a language."""
    language = rng.choice(LANGUAGES)
    return conversation([(rng.choice(requests[language]), tell(language))], context)


def picture_behind(messages: Sequence[dict], context: str = TAG) -> list[dict]:
    """The same conversation with its picture, or pictures, behind the first question."""
    first = messages[0]["content"].removeprefix(f"{context}\n")
    return [{**messages[0], "content": f"{first}\n{context}"}, *messages[1:]]


def caption_conversation(scene: Scene, rng: Random) -> list[dict]:
    """Stage 1's conversation: a request and the caption, in one language."""
    return telling(CAPTION_REQUESTS, partial(caption, scene), rng)


def question_conversations(
    scene: Scene, rng: Random, count: int, vocabulary: int | None = None, relations: bool = False,
    behind: float = BEHIND,
) -> list[list[dict]]:  # fmt: skip
    """Stage 2's conversations about one picture: `count` single questions, one conversation of a few, a roll call in
    either language, and a caption.

    Each question stands alone, because in a conversation of several an answer can be guessed from the words before it
    ("where is the cat?" tells what there is), without a look at the picture. Of some pictures one question is asked
    again with the picture behind it: others put it there, and a model that never saw that answers none of them.

    behind: share of such pictures. relations: also about what is beside what, what is larger, and what a turn before
    has named.
    """
    weights = KIND_WEIGHTS | (RELATION_WEIGHTS if relations else {})
    talks = _conversations(TAG, scene, rng, count, vocabulary, weights)
    if relations:
        kind = rng.choice(["where", "what", *["beside"] * 2 * bool(neighbours(scene))])
        talks.append(conversation(reference_talk(scene, rng, kind, rng.choice(LANGUAGES)), TAG))
    talks += [conversation([roll_call(scene, rng, language, vocabulary)], TAG) for language in LANGUAGES]
    talks.append(caption_conversation(scene, rng))
    if rng.random() < behind:
        talks.append(picture_behind(talks[0]))
    return talks


def reading_conversations(scene: Scene, rng: Random, count: int, vocabulary: int | None = None) -> list[list[dict]]:
    """The base decoder's practice: the same requests about a scene in words, often in the other language."""
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.2:
        return _conversations(caption(scene, language), scene, rng, count, vocabulary, KIND_WEIGHTS)
    context = notes(scene, language, rng)
    talks = _conversations(context, scene, rng, count, vocabulary, KIND_WEIGHTS)
    return [*talks, telling(CAPTION_REQUESTS, partial(caption, scene), rng, context)]


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


def reference_talk(scene: Scene, rng: Random, kind: str, language: str) -> list[tuple[str, str]]:
    """Two turns, of which the second says `it` of what the first has named.

    kind: what the second asks: "where" it is, "what" they are, or what is "beside" it, where anything can be.
    """
    follow = rng.choice(FOLLOW_UPS[language][kind])
    if kind == "what":
        return [ask(scene, "count", language, rng), (follow, list_of_names(scene, language))]
    thing, direction, other = rng.choice(neighbours(scene)) if kind == "beside" else (rng.choice(scene.things), 0, None)
    subject, place = name(thing.concept, language), PLACES[language][thing.place]
    if kind == "where":
        opening = rng.choice(QUESTIONS[language]["yesno"][:2]).format(subject)
        return [(opening, YES_NO[language][0]), (follow, place)]
    openings = [
        (rng.choice(QUESTIONS[language]["where"]).format(subject), place),
        (rng.choice(QUESTIONS[language]["at"]).format(place), subject),
    ]
    return [rng.choice(openings), (follow.format(DIRECTIONS[language][direction]), name(other.concept, language))]


def roll_call(scene: Scene, rng: Random, language: str, vocabulary: int | None = None) -> tuple[str, str]:
    """Names of things that are there and of others, in any order, and behind each its place, or no.

    What follows a name here must be looked up by that name, and stands right behind it. In "where is the cat?" the look
    must be taken at the name and its outcome carried to the end of the question, two things that are of no use alone:
    without roll calls a decoder guesses among the places of things for thousands of steps (docs/performance.md).
    """
    places = {thing.concept: PLACES[language][thing.place] for thing in scene.things}
    called = [*places, *rng.sample(absent(scene, vocabulary), max(2, len(places)))]
    rng.shuffle(called)
    called, space = called[:MOST_CALLED], "" if language == "zh" else " "
    names = [name(concept, language) for concept in called]
    said = [places.get(concept, YES_NO[language][1]) for concept in called]
    answer = REMARKS_APART[language].join(map(space.join, zip(names, said, strict=True)))
    return rng.choice(ROLL_CALLS[language]).format(NAMES_APART[language].join(names)), answer


def askable_of_pair(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """The kinds of PAIR_KINDS that have an answer: two pictures of one thing, the same, cannot be told apart by it."""
    return PAIR_KINDS if any(len(scene.things) > 1 for scene in scenes) else ("both",)


def ask_pair(scenes: Sequence[Scene], shared: int, kind: str, language: str, rng: Random) -> tuple[str, str]:
    """A question about two pictures and its answer: what is in both, which one shows a thing, what is in one."""
    wording, number = rng.choice(PAIR_QUESTIONS[language][kind]), rng.randrange(2)
    ordinal = ORDINALS[language][number]
    if kind == "both":
        return wording, name(shared, language)
    if kind == "what":
        return wording.format(ordinal), list_of_names(scenes[number], language)
    alone = [[thing.concept for thing in scene.things if thing.concept != shared] for scene in scenes]
    number = number if alone[number] else 1 - number
    if not alone[number]:
        raise ValueError("both pictures show one thing, the same: no question tells them apart")
    return wording.format(name(rng.choice(alone[number]), language)), ORDINALS[language][number]


def pair_conversations(scenes: Sequence[Scene], shared: int, rng: Random, count: int) -> list[list[dict]]:
    """`count` questions about two pictures, each alone."""
    possible = (*askable_of_pair(scenes), "what")
    kinds = rng.choices(possible, [PAIR_WEIGHTS[kind] for kind in possible], k=count)
    asked = [ask_pair(scenes, shared, kind, rng.choice(LANGUAGES), rng) for kind in kinds]
    return single_questions(asked, f"{TAG}\n{TAG}")


def _conversations(
    context: str, scene: Scene, rng: Random, count: int, vocabulary: int | None, weights: dict[str, int]
) -> list[list[dict]]:
    possible = [kind for kind in askable(scene) if kind in weights]
    kinds = rng.choices(possible, [weights[kind] for kind in possible], k=count + TALK)
    asked = [ask(scene, kind, rng.choice(LANGUAGES), rng, vocabulary) for kind in kinds]
    talks = [[pair] for pair in dict.fromkeys(asked[TALK:])] + [list(dict.fromkeys(asked[:TALK]))]
    return [conversation(pairs, context) for pairs in talks]
