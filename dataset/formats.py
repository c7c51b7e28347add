"""What public formats' records say: one function a format, each giving the same Talk. A new format is one of them.

minimind    {"conversations": [{"role", "content"}, ...], "image": "a.jpg, b.jpg"}; {"text": "..."} for the base decoder
llava       {"id", "image": "a.jpg", "conversations": [{"from": "human", "value"}, ...]}; ALLaVA and ShareGPT4V as well
messages    {"messages": [{"role", "content": text or typed parts}, ...], "images": [...]}, as chat templates take them
finevision  {"texts": [{"user", "assistant"}, ...], "images": [...]}, with ratings in lists; the_cauldron as well
choices     {"image", "question", "A", "B", ..., "answer": "B"}, with a "hint" and a "category"; VLMEvalKit's tables
questions   {"image", "question", "answer"}
captions    {"image" or "file_name", "text" or "caption"}
text        {"text"} for the base decoder

A record of any format may name videos as well, {"video": "a.mp4"} with a <video> where each goes.
How records are stored is nobody's business here: dataset.readers has lines, parquets, folders and archives.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from dataset.options import AUTO, ReadOptions
from dataset.samples import BAD, DROPPED, MAX_TEXT, DataError, shown
from model.messages import counted, plain
from model.processing import IMAGE_TAG

PICTURE_FIELDS = ("image", "images", "file_name")
VIDEO_FIELDS, VIDEO_TAG = ("video", "videos"), "<video>"
EMBEDDED_PICTURES = "image_bytes"  # of any format: pictures that are stored with the record
TEXT_FIELDS = ("conversations", "messages", "texts", "text", "caption", "question", "answer")
NESTED_FIELDS = ("conversations", "messages", "texts")  # which some tables hold as JSON text
RATINGS = ("relevance_ratings", "image_correspondence_ratings", "visual_dependency_ratings", "formatting_ratings")
SPEAKERS = {
    "system": "system", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of choices
DESCRIBE = {"en": "What is in the picture?", "zh": "图中有什么？"}  # what a caption answers
TAGS = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")
CHINESE = re.compile("[\u4e00-\u9fff]")


class Unfit(Exception):
    """A record that cannot be used. kind: as of Rejected."""

    def __init__(self, reason: str, kind: str = BAD):
        self.reason, self.kind = reason, kind
        super().__init__(reason)


class Talk(NamedTuple):
    """What a record says: messages, or a plain text."""

    messages: list[dict]  # role and content, IMAGE_TAG where a picture goes
    text: str | None = None
    places_pictures: bool = True  # whether the text says where they go; else they come first


def minimind(record: dict, options: ReadOptions) -> Talk:
    if "text" in record:
        if names := picture_names(record, "minimind"):
            raise Unfit(
                f"'text' is learnt without pictures, but 'image' names {len(names)}: delete 'image', or give "
                "'conversations' with an <image> for each"
            )
        if "conversations" in record:
            raise Unfit("it has 'text' and 'conversations': delete one, or say which with --data_format")
        return text(record, options)
    messages = _objects(record, "conversations", '{"role", "content"}')
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise Unfit(f"a message's 'content' must be text, it is {shown(message.get('content'))}")
    return Talk(messages)


def llava(record: dict, options: ReadOptions) -> Talk:
    messages = []
    for turn in _objects(record, "conversations", '{"from", "value"}'):
        if not isinstance(turn.get("from"), str) or turn["from"] not in SPEAKERS:
            raise Unfit(f"a turn is 'from' {shown(turn.get('from'))}: it must be one of {', '.join(SPEAKERS)}")
        if not isinstance(turn.get("value"), str):
            raise Unfit(f"a turn's 'value' must be text, it is {shown(turn.get('value'))}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return Talk(messages)


def messages(record: dict, options: ReadOptions) -> Talk:
    found = _objects(record, "messages", '{"role", "content"}')
    tags = {"image": IMAGE_TAG} | ({"video": VIDEO_TAG} if video_names(record) else {})
    talk = [{"role": message.get("role"), "content": _content(message.get("content"), tags)} for message in found]
    return Talk(talk, places_pictures=any(IMAGE_TAG in message["content"] for message in talk))


def finevision(record: dict, options: ReadOptions) -> Talk:
    turns = _objects(record, "texts", '{"user", "assistant"}')
    kept = [turn for number, turn in enumerate(turns) if _rating(record, number) >= options.min_rating]
    if not kept:
        raise Unfit(f"no turn is rated {options.min_rating} or better", DROPPED)
    talk = []
    for turn in kept:
        for role in ("user", "assistant"):
            if not isinstance(turn.get(role), str):
                raise Unfit(f"a turn's {role!r} must be text, it is {shown(turn.get(role))}")
            talk.append({"role": role, "content": turn[role]})
    return Talk(talk, places_pictures=any(IMAGE_TAG in message["content"] for message in talk))


def choices(record: dict, options: ReadOptions) -> Talk:
    question, offered = record.get("question"), choices_of(record)
    if not isinstance(question, str) or not question.strip():
        raise Unfit(f"'question' must be text that is not empty, it is {shown(question)}")
    if len(offered) < 2:
        raise Unfit(f"it has {len(offered)} choices: give at least two, in fields A and B and on")
    answer = str(record.get("answer", "")).strip()
    if answer not in tuple(LETTERS[: len(offered)]):
        right = ", ".join(LETTERS[: len(offered)])
        raise Unfit(f"'answer' is {shown(record.get('answer'))}: it must be the letter of a choice, {right}")
    return _one_turn(choice_prompt(question, offered, str(record.get("hint") or "")), answer)


def choices_of(record: dict) -> tuple[str, ...]:
    """What is offered under A, B and on, up to the first letter that is missing."""
    said = (record.get(letter) for letter in LETTERS)
    return tuple(takewhile(bool, ("" if choice is None else str(choice).strip() for choice in said)))


def choice_prompt(question: str, offered: Sequence[str], hint: str = "") -> str:
    """A question and its choices in VLMEvalKit's words, so that every model is asked the same."""
    lines = [f"Hint: {hint}"] if hint else []
    lines += [f"Question: {question}", "Options:"]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, offered, strict=False)]
    return "\n".join([*lines, "Please select the correct answer from the options above."])


def questions(record: dict, options: ReadOptions) -> Talk:
    question, answer = record.get("question"), record.get("answer")
    answer = answer[0] if isinstance(answer, list) and answer else answer  # several that count as right: the first
    for name, said in (("question", question), ("answer", answer)):
        if not isinstance(said, str) or not said.strip():
            raise Unfit(f"{name!r} must be text that is not empty, it is {shown(said)}")
    return _one_turn(question, answer)


def captions(record: dict, options: ReadOptions) -> Talk:
    name = next((name for name in ("text", "caption") if name in record), "text")
    caption = record.get(name)
    if not isinstance(caption, str) or not caption.strip():
        raise Unfit(f"{name!r} must be a caption, it is {shown(caption)}")
    return _one_turn(DESCRIBE["zh" if CHINESE.search(caption) else "en"], caption.strip())


def text(record: dict, options: ReadOptions) -> Talk:
    if not isinstance(record.get("text"), str) or not record["text"]:
        raise Unfit("'text' must be text that is not empty")
    return Talk([], record["text"])


class Format(NamedTuple):
    read: Callable[[dict, ReadOptions], Talk]
    tells: Callable[[dict], bool]  # whether a record, in data that nobody has named the format of, is one of these
    pictures: tuple[str, ...] = ("image", "images", "file_name")  # fields; the first that a record has names its own
    kept: tuple[str, ...] = ()  # fields of text that stay with the sample as they are, too


# In the order in which they are tried; their names are dataset.options.FORMATS.
FORMATS: dict[str, Format] = {
    "finevision": Format(finevision, lambda record: "texts" in record),
    "messages": Format(messages, lambda record: "messages" in record),
    "llava": Format(llava, lambda record: "from" in _first_turn(record)),
    "choices": Format(choices, lambda record: {"question", "answer", "A", "B"} <= record.keys(), kept=("question",)),
    "questions": Format(questions, lambda record: {"question", "answer"} <= record.keys()),
    "captions": Format(captions, lambda record: "caption" in record or "text" in record and _has_picture(record)),
    "minimind": Format(minimind, lambda record: "conversations" in record or "text" in record, ("image",)),
    "text": Format(text, lambda record: False),  # of a .txt, or asked for by name; minimind reads such records, too
}


def recognised(record: dict) -> str | None:
    """The name of the format that a record looks like."""
    return next((name for name, format in FORMATS.items() if format.tells(record)), None)


def check_columns(path: Path | str, names: Iterable[str]) -> None:
    """Raises DataError where a table has no column that a format is known by."""
    if not set(TEXT_FIELDS) & set(names):
        raise DataError(
            f"{path}: none of its columns is one that a format is known by ({', '.join(TEXT_FIELDS)}); it has "
            f"{', '.join(map(plain, names))}: rename them, see docs/data_formats.md"
        )


def picture_names(record: dict, format: str) -> list:
    """What a record says of its pictures: names, bytes, or {"bytes", "path"} objects, in order. Raises Unfit."""
    fields = (EMBEDDED_PICTURES, *FORMATS[format].pictures)
    field = next((field for field in fields if record.get(field)), None)
    named = record[field] if field else []
    several = format == "minimind" and isinstance(named, str)  # with commas between them
    names = [name.strip() for name in named.split(",")] if several else named
    names = names if isinstance(names, list) else [names]
    if not all(name and (isinstance(name, (str, bytes)) or _is_stored(name)) for name in names):
        said = names if isinstance(named, str) else named
        raise Unfit(f"{field!r} is {shown(said)}: it must be a file name or a list of them")
    return names


class Video(NamedTuple):
    """What a record says of a video: its name, bytes, or a {"bytes", "path"} object."""

    source: str | bytes | dict


def video_names(record: dict) -> list[Video]:
    """In order. Raises Unfit."""
    field = next((field for field in VIDEO_FIELDS if record.get(field)), None)
    named = record[field] if field else []
    names = named if isinstance(named, list) else [named]
    if not all(name and (isinstance(name, (str, bytes)) or _is_stored(name)) for name in names):
        raise Unfit(f"{field!r} is {shown(named)}: it must be a file name or a list of them")
    return [Video(name) for name in names]


def with_videos(messages: Sequence[dict], names: list, videos: list[Video]) -> list:
    """Pictures and videos in the order of their tags; a video's tag in the messages becomes a picture's. Or Unfit."""
    tags = [tag for message in messages for tag in TAGS.findall(message["content"])]
    if tags.count(VIDEO_TAG) != len(videos):
        there = counted(len(videos), "videos")
        raise Unfit(f"the text holds {tags.count(VIDEO_TAG)} {VIDEO_TAG} but the sample has {there}: make them equal")
    for message in messages:
        message["content"] = message["content"].replace(VIDEO_TAG, IMAGE_TAG)
    pictures, films = iter(names), iter(videos)
    ordered = [next(films) if tag == VIDEO_TAG else next(pictures, None) for tag in tags]
    return [*(name for name in ordered if name is not None), *pictures]


def read_record(record: dict, format: str, options: ReadOptions) -> tuple[Talk, list]:
    """What a record says, and what it says of its pictures, with a Video where one is. Raises Unfit."""
    names, videos = picture_names(record, format), video_names(record)
    try:
        talk = FORMATS[format].read(record, options)
    except Unfit as error:
        other = recognised(record)
        if error.kind == DROPPED or other in (None, format):
            raise
        cure = "give each a file of its own" if options.data_format == AUTO else "leave out --data_format"
        reason = f"{error.reason}; it looks like {other} in data of {format}: {cure}"
        raise Unfit(reason) from None
    for said in [talk.text or "", *(message["content"] for message in talk.messages)]:
        if len(said) > MAX_TEXT:
            raise Unfit(f"a text of {len(said):,} letters, more than {MAX_TEXT:,}: split or delete it")
    if talk.text is not None:
        return talk, []
    places_videos = any(VIDEO_TAG in message["content"] for message in talk.messages)
    if (names or videos) and not talk.places_pictures and not (videos and places_videos):
        first = next((message for message in talk.messages if message["role"] == "user"), None)
        if first is None:
            raise Unfit("it has pictures, and no user's turn to show them in")
        first["content"] = IMAGE_TAG * len(names) + VIDEO_TAG * len(videos) + "\n" + first["content"]
    return talk, with_videos(talk.messages, names, videos) if videos else names


def _is_stored(picture: object) -> bool:
    """Whether it is a picture as the data sets library stores one."""
    return isinstance(picture, dict) and "bytes" in picture and picture.keys() <= {"bytes", "path"}


def _objects(record: dict, field: str, what: str) -> list[dict]:
    """A list of objects that is not empty. Raises Unfit."""
    found = record.get(field)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise Unfit(f"{field!r} must be a list of {what}, it is {shown(found)}")
    return found


def _content(content: object, tags: dict[str, str]) -> str:
    """Text, or typed parts as text with tags. tags: of what a part may be beside text. Raises Unfit."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Unfit(f"a message's 'content' must be text or a list of parts, it is {shown(content)}")
    said = []
    for part in content:
        kind, words = part.get("type"), part.get("text")
        if kind != "text" and kind not in tags or kind == "text" and not isinstance(words, str):
            raise Unfit(f"a content part must be text or an {' or a '.join(tags)}, it is {shown(part)}")
        for tag in tags.values() if kind == "text" else ():
            if tag in words:
                raise Unfit(f"a text part holds {tag}, which would be read as a picture: write it otherwise")
        said.append(tags.get(kind, words))
    return "".join(said)


def _rating(record: dict, turn: int) -> float:
    """The lowest of a turn's ratings; what is not rated is not left out."""
    found = [record[name][turn] for name in RATINGS if len(record.get(name) or ()) > turn]
    return min((rating for rating in found if rating is not None), default=float("inf"))


def _one_turn(question: str, answer: str) -> Talk:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Talk(talk, places_pictures=IMAGE_TAG in question)


def _first_turn(record: dict) -> dict:
    turns = record.get("conversations")
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def _has_picture(record: dict) -> bool:
    return any(record.get(name) for name in (EMBEDDED_PICTURES, *PICTURE_FIELDS, *VIDEO_FIELDS))
