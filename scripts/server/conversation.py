"""Messages as OpenAI's clients send them, as the model reads them: roles, the order of words and pictures, limits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.messages import counted
from scripts.server.errors import Refused
from scripts.server.limits import Limits
from scripts.server.requests import Message, Part


@dataclass
class Conversation:
    """messages: for Answerer.prompt; pictures: (address, where it stands) in the order of their places."""

    messages: list[dict] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)


def read_conversation(messages: Sequence[Message], limits: Limits, keep_order: bool = False) -> Conversation:
    """What people type stays text: <image>, control tokens and rows of @, too.

    keep_order: pictures stay between the words where they were sent. Otherwise those of a message come first, with a
    line break behind them, as in training: OpenAI's examples send the question first, and the quickstart's model then
    answers half as many right (27 of 60 held-out questions; 53 with the picture first).

    Raises:
        Refused: too much of anything, a picture where none can be, or no question at the end.
    """
    conversation, characters = Conversation(), 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        characters += sum(len(part.text or "") for part in message.content)
        pictures = _pictures_of(message, where)
        if len(pictures) > limits.pictures:
            raise Refused(f"has {counted(len(pictures), 'pictures')}, and a message may have {limits.pictures}: "
                          "send the others in further turns", where)  # fmt: skip
        conversation.pictures += pictures
        role = "system" if message.role == "developer" else message.role
        parts = message.content if keep_order else _pictures_first(message.content)
        conversation.messages.append({"role": role, "content": [_as_rendered(part) for part in parts]})
    if len(conversation.pictures) > limits.pictures_in_all:
        raise Refused(f"hold {counted(len(conversation.pictures), 'pictures')}, and a conversation may have "
                      f"{limits.pictures_in_all}: leave older ones out", "messages")  # fmt: skip
    if max(characters, len(messages)) > limits.characters:
        raise Refused(f"hold {characters:,} characters in {counted(len(messages), 'messages')}, more than "
                      f"{limits.characters:,}: send less", "messages")  # fmt: skip
    if messages[-1].role != "user":
        raise Refused(f"is of the role {messages[-1].role}: the last message must be a user's, the question",
                      f"messages[{len(messages) - 1}]")  # fmt: skip
    return conversation


def _pictures_of(message: Message, where: str) -> list[tuple[str, str]]:
    pictures = []
    for number, part in enumerate(message.content):
        place = f"{where}.content[{number}]"
        wanted, other = ("text", "image_url") if part.type == "text" else ("image_url", "text")
        if getattr(part, wanted) is None or getattr(part, other) is not None:
            raise Refused(f"is of the type {part.type}: it must have {wanted!r}, and no {other!r}", place)
        if part.type == "image_url" and message.role != "user":
            raise Refused(f"is a picture in a message of the role {message.role}: only a user's may have some", place)
        if part.image_url:
            pictures.append((part.image_url.url, place))
    return pictures


def _pictures_first(parts: Sequence[Part]) -> list[Part]:
    pictures = [part for part in parts if part.type == "image_url"]
    text = "\n".join(part.text for part in parts if part.type == "text")
    return [*pictures, Part(type="text", text="\n" + text.removeprefix("\n") if pictures else text)]


def _as_rendered(part: Part) -> dict:
    return {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
