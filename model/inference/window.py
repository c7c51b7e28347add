"""A window over a conversation: where all of it is too long, its oldest turns are forgotten, each of them whole.

A turn is a user's message with its pictures and what was answered to it; system messages at the beginning are no turn
and stay. What is left is rendered as if the conversation had begun with it, so that no half picture, no half sentence
and no key or value of anything forgotten remains.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from model.processing import content_parts


class Forgotten(NamedTuple):
    """What a window has left out of a conversation, from its beginning."""

    turns: int = 0
    pictures: int = 0  # of these turns


def newest_turns(
    messages: Sequence[dict], fits: Callable[[list[dict], Forgotten], bool]
) -> tuple[list[dict], Forgotten]:
    """As many of the newest turns as fit, behind the system messages; the last alone where not even that does.

    fits: told what is left and what is gone.

    Raises:
        SampleError: a message that is forgotten has a content of the wrong kind.
    """
    turns, system = split_turns(messages)
    for count in range(max(len(turns), 1)):
        gone = [message.get("content") for turn in turns[:count] for message in turn]
        pictures = sum(kind == "image" for content in gone for kind, _ in content_parts(content))
        kept, forgotten = system + sum(turns[count:], []), Forgotten(count, pictures)
        if fits(kept, forgotten):
            break
    return kept, forgotten


def split_turns(messages: Sequence[dict]) -> tuple[list[list[dict]], list[dict]]:
    """The turns of a conversation, and the system messages before the first."""
    begin = next((place for place, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    turns: list[list[dict]] = []
    for before, message in zip([None, *messages[begin:]], messages[begin:], strict=False):
        follows_answer = before is not None and before.get("role") == "assistant"
        if not turns or follows_answer and message.get("role") != "assistant":
            turns.append([])
        turns[-1].append(message)
    return turns, list(messages[:begin])
