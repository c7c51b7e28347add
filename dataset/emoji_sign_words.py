"""Emoji World's fine print in words: what can be asked about signs, and answered, in English and Chinese.

A text is one token a letter or digit in the shipped tokenizer, in capitals as it stands on the board; quotation marks
keep it so inside a sentence, where a space before it would become a part of its first token.
"""

from collections.abc import Sequence
from functools import partial
from random import Random

from dataset import emoji_words as words
from dataset.emoji_signs import NUMBERS, Sign, SignScene
from dataset.emoji_talks import single_questions, telling
from dataset.emoji_world import LANGUAGES

SIGN_KINDS = ("word", "number", "which", "signs")
KINDS = (*SIGN_KINDS, "where", "yesno")  # the last two are about things, as Emoji World asks them: a control
SAYS = {  # of a word or of a number
    "en": ("What does the {} sign say?", "What is written on the {} sign?", "Read the {} sign.",
           "What stands on the {} sign?", "Tell me what the {} sign says.", "What can be read on the {} sign?"),
    "zh": ("{}的牌子上写着什么？", "{}牌子上写的是什么？", "读一读{}的牌子。", "告诉我{}的牌子上写着什么。",
           "{}的牌子写了什么？", "{}牌子上能读到什么？"),
}  # fmt: skip
QUESTIONS = {  # {}: the colour of a board, of the kind "which" the text on it
    "en": {
        "word": (*SAYS["en"], "Which word is on the {} sign?", "What word does the {} sign show?"),
        "number": (*SAYS["en"], "What number is on the {} sign?", "Which number does the {} sign show?"),
        "which": (
            'Which sign says "{}"?', 'What colour is the sign that says "{}"?', 'On which sign is "{}" written?',
            'Find the sign with "{}". Which colour has it?', 'Which sign shows "{}"?',
            'On what colour is "{}" written?',
        ),
        "signs": (
            "How many signs are there?", "How many signs do you see?", "Count the signs.",
            "What is the number of signs?", "How many signs are in the picture?", "Tell me how many signs there are.",
        ),
    },
    "zh": {
        "word": (*SAYS["zh"], "{}的牌子上是哪个词？", "{}牌子上写着哪个词？"),
        "number": (*SAYS["zh"], "{}的牌子上是什么数字？", "{}牌子上写着哪个数字？"),
        "which": (
            "哪块牌子上写着“{}”？", "写着“{}”的牌子是什么颜色？", "“{}”写在哪块牌子上？",
            "找一找“{}”，牌子是什么颜色？", "什么颜色的牌子写着“{}”？", "“{}”在什么颜色的牌子上？",
        ),
        "signs": (
            "有几块牌子？", "你看到几块牌子？", "数一数牌子。", "牌子的数量是多少？", "图中有多少块牌子？",
            "告诉我有几块牌子。",
        ),
    },
}  # fmt: skip


READ_ALL = {
    "en": ("Read all signs.", "What do the signs say?", "What is written here?", "Tell me what the signs say."),
    "zh": ("读一读所有的牌子。", "牌子上都写着什么？", "这里写着什么？", "告诉我牌子上写了什么。"),
}


def kind_of(sign: Sign) -> str:
    return "number" if sign.text in NUMBERS else "word"


def caption(scene: SignScene, language: str) -> str:
    """Everything: the things as Emoji World tells them, then the signs and what they say, in the order of BOARDS."""
    space = "" if language == "zh" else " "
    return words.caption(scene, language) + space + told(scene.signs, language)


def told(signs: Sequence[Sign], language: str) -> str:
    """How many there are, and what they say."""
    number = words.NUMBERS[language][len(signs) - 1]
    listed = [(words.COLOURS[language][sign.colour], sign.text) for sign in signs]
    if language == "zh":
        return f"{number}块牌子：" + "，".join(f"{colour}写着“{text}”" for colour, text in listed) + "。"
    plural = "s" if len(signs) > 1 else ""
    return f"{number.capitalize()} sign{plural}: " + ", ".join(f'{c} says "{text}"' for c, text in listed) + "."


def ask(
    scene: SignScene, kind: str, language: str, rng: Random, vocabulary: int | None = None, sign: Sign | None = None
) -> tuple[str, str]:
    """A question of one of KINDS and its exact answer: the text, a colour, a number, a place, yes or no.

    sign: the one that is asked about; without it any that the kind fits. vocabulary: of things that are asked after.
    """
    if kind not in SIGN_KINDS:
        return words.ask(scene, kind, language, rng, vocabulary)
    wording = rng.choice(QUESTIONS[language][kind])
    if kind == "signs":
        return wording, words.NUMBERS[language][len(scene.signs) - 1]
    sign = sign or rng.choice([sign for sign in scene.signs if kind in ("which", kind_of(sign))])
    colour = words.COLOURS[language][sign.colour]
    return (wording.format(sign.text), colour) if kind == "which" else (wording.format(colour), sign.text)


def caption_conversation(scene: SignScene, rng: Random) -> list[dict]:
    return telling(words.CAPTION_REQUESTS, partial(caption, scene), rng)


def told_conversation(signs: Sequence[Sign], rng: Random) -> list[dict]:
    """Stage 1's about a close-up: its signs are told, and nothing of the things, which may be cut."""
    return telling(READ_ALL, partial(told, signs), rng)


def question_conversations(scene: SignScene, rng: Random, vocabulary: int | None = None) -> list[list[dict]]:
    """Stage 2's conversations about one picture, a question each: every sign is read in both languages and looked for
    in one, the signs are counted, and as many questions are about the things; and a caption."""
    asked = reading_pairs(scene, scene.signs, rng)
    for kind in ("signs", "where", "where", "yesno", "yesno"):
        asked.append(ask(scene, kind, rng.choice(LANGUAGES), rng, vocabulary))
    return [*single_questions(asked), caption_conversation(scene, rng)]


def close_up_conversations(scene: SignScene, signs: Sequence[Sign], rng: Random) -> list[list[dict]]:
    """Stage 2's about a close-up: its signs are read and looked for, and told."""
    return [*single_questions(reading_pairs(scene, signs, rng)), told_conversation(signs, rng)]


def reading_pairs(scene: SignScene, signs: Sequence[Sign], rng: Random) -> list[tuple[str, str]]:
    """Questions and answers: each of these signs is read in both languages and looked for in one."""
    asked = []
    for sign in signs:
        asked += [ask(scene, kind_of(sign), language, rng, sign=sign) for language in LANGUAGES]
        asked.append(ask(scene, "which", rng.choice(LANGUAGES), rng, sign=sign))
    return asked
