"""The browser demo's conversations: turns with their pictures, what is let in, and examples to begin with."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from random import Random
from typing import TYPE_CHECKING

from PIL import Image

from dataset import emoji_world as world
from model.inference.answerer import Answer, Options, assistant_turn, user_turn
from model.inference.attention_map import Looked
from model.messages import UserError
from model.processing import SampleError, open_picture

if TYPE_CHECKING:
    from scripts.demo.engine import Weight

MOST_BYTES = 10 * 1024 * 1024  # a picture, as maxUploadSize in .streamlit/config.toml
MOST_PICTURES = 4  # a message
MOST_PICTURES_IN_ALL = 8  # a conversation
MOST_CHARACTERS = 4000  # a message
SHOWN_SIDE = 1024  # pixels that a picture keeps for being looked at
EXAMPLES = 4
EXAMPLE_CONCEPTS = 128  # those of the quickstart
_decoding = threading.BoundedSemaphore(2)  # pictures at a time: one may take 300 MB


class Refused(UserError):
    """What a person is told and can mend: a key of scripts.demo.words, and the numbers in its sentence."""

    def __init__(self, key: str, **facts: object):
        super().__init__(key)
        self.key, self.facts = key, facts


@dataclass(frozen=True)
class Picture:
    shown: bytes  # JPEG, at most SHOWN_SIDE a side, with nothing in it but pixels
    square: Image.Image  # as the model gets it: squeezed whole, exactly as eval_vlm.py would


@dataclass
class Turn:
    """A question with its own pictures, and its answer once there is one."""

    question: str
    pictures: list[Picture] = field(default_factory=list)
    credit: str = ""  # who made the pictures, where that must be said
    suggestions: list[str] = field(default_factory=list)  # what else might be asked about an example
    left_out: list[Refused] = field(default_factory=list)  # pictures that were sent with it and cannot be used
    weight: "Weight | None" = None  # who was asked, and how
    options: Options | None = None
    answer: Answer | None = None
    failure: str = ""  # a key of scripts.demo.words
    looked: tuple[Looked, list[tuple[str, slice]]] | None = None  # and the words of the answer
    second: "Turn | None" = None  # the same question to other weights, side by side


def take_picture(content: bytes, image_size: int) -> Picture:
    """An uploaded file as a picture. Its name is never looked at: what it is says its content alone.

    image_size: side of the square that the model sees, pixels.

    Raises:
        Refused: too many bytes or pixels, no picture of the known formats, or damaged.
    """
    if len(content) > MOST_BYTES:
        raise Refused("too_large", megabytes=MOST_BYTES // 1024**2)
    try:
        open_picture(BytesIO(content), decode=False)  # the header alone, so that a bomb costs nothing
        with _decoding:
            return keep_picture(open_picture(BytesIO(content)), image_size)
    except SampleError as error:
        too_many = error.__cause__ is None or isinstance(error.__cause__, Image.DecompressionBombError)
        raise Refused("too_many_pixels" if too_many else "no_picture") from error


def keep_picture(picture: Image.Image, image_size: int) -> Picture:
    """picture: RGB. Only pixels are kept: no EXIF, no place where it was taken, no comment."""
    bare = Image.new("RGB", picture.size)
    bare.paste(picture)
    square = bare.resize((image_size, image_size), Image.Resampling.BICUBIC)
    bare.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = BytesIO()
    bare.save(file, "JPEG", quality=90)
    return Picture(file.getvalue(), square)


def new_turn(turns: Sequence[Turn], question: str, files: Sequence[bytes], image_size: int | None) -> Turn:
    """The next turn of a conversation, all of it checked; pictures that take_picture refuses are left out of it.

    image_size: None for weights without eyes.

    Raises:
        Refused: too long, too many pictures, or none of them that can be used (facts say the how many-th).
    """
    if len(question) > MOST_CHARACTERS:
        raise Refused("too_many_characters", characters=MOST_CHARACTERS)
    if files and image_size is None:
        raise Refused("no_eyes")
    if len(files) > MOST_PICTURES:
        raise Refused("too_many_pictures", pictures=MOST_PICTURES)
    if len(files) + sum(len(turn.pictures) for turn in turns) > MOST_PICTURES_IN_ALL:
        raise Refused("too_many_in_all", pictures=MOST_PICTURES_IN_ALL)
    turn = Turn(question)
    for number, content in enumerate(files, 1):
        try:
            turn.pictures.append(take_picture(content, image_size))
        except Refused as error:
            turn.left_out.append(Refused(error.key, number=number, **error.facts))
    if turn.left_out and not turn.pictures:  # an answer without the picture would be about nothing
        raise turn.left_out[0]
    return turn


def asked_otherwise(turn: Turn, question: str) -> Turn:
    """The turn with another question about its pictures, not yet answered. Raises Refused where it is too long."""
    if len(question) > MOST_CHARACTERS:
        raise Refused("too_many_characters", characters=MOST_CHARACTERS)
    suggestions = [other for other in turn.suggestions if other != question]
    return Turn(question, turn.pictures, turn.credit, suggestions, turn.left_out)


def seconds(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation as the second weights know it: their own answers, and the first's where they were not asked."""
    return [turn.second or turn for turn in turns]


def conversation(turns: Sequence[Turn]) -> tuple[list[dict], list[Image.Image]]:
    """Messages up to the last turn's question, and the pictures of all of them in order."""
    messages: list[dict] = []
    for turn in turns:
        messages.append(user_turn(turn.question, len(turn.pictures)))
        messages.append(assistant_turn(turn.answer.text if turn.answer else ""))
    return messages[:-1], [picture.square for turn in turns for picture in turn.pictures]


@dataclass(frozen=True)
class Example:
    scene: Image.Image
    questions: list[str]


def examples(language: str) -> list[Example]:
    """The first scenes of a held-out row of Emoji World, with a question of each kind, a different one first."""
    found = []
    for index in range(EXAMPLES):
        scene = world.sample_scene(seed=99, split="held_out", index=index, vocabulary=EXAMPLE_CONCEPTS)
        rng = Random(f"example:{index}")
        questions = [world.ask(scene, kind, language, rng, EXAMPLE_CONCEPTS)[0] for kind in world.KINDS]
        found.append(Example(world.render(scene)[0], questions[index:] + questions[:index]))
    return found
