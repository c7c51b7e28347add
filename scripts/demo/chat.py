"""What a tab of the browser demo holds, and what a click does to it; web_demo.py and view.py know how it is shown."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random

from PIL import Image

from dataset import emoji_words as words
from dataset import emoji_world as world
from model.inference.answerer import Answer, Options, assistant_turn, user_turn
from model.inference.attention_map import Looked
from model.views import Frames, Sight
from scripts.demo import limits
from scripts.demo.engine import Engine, Job
from scripts.demo.limits import Picture, Refused, prepare_picture, read_upload
from scripts.demo.remote import Remote
from scripts.demo.weights import Weight

EXAMPLES = 4
EXAMPLE_CONCEPTS = 128  # those of the quickstart


@dataclass
class Reply:
    """What one model is asked, and what came of it."""

    weight: Weight
    options: Options
    job: Job | None = None  # while the answer is still to come
    answer: Answer | None = None
    failure: str = ""  # a key of scripts.demo.text
    attention: tuple[Looked, list[tuple[str, slice]]] | None = None  # and the answer's words; once it was asked for


@dataclass
class Turn:
    """A question with its own pictures, and the replies to it. Raises Refused where the question is too long."""

    question: str
    pictures: list[Picture] = field(default_factory=list)
    credit: str = ""  # who made the pictures, where that must be said
    suggestions: list[str] = field(default_factory=list)  # what else might be asked about an example
    left_out: list[Refused] = field(default_factory=list)  # pictures that were sent with it and cannot be used
    replies: list[Reply] = field(default_factory=list)  # one, or two side by side

    def __post_init__(self) -> None:
        if len(self.question) > limits.MAX_CHARACTERS:
            raise Refused("too_many_characters")
        self.suggestions = [other for other in self.suggestions if other != self.question]

    def asked_anew(self, question: str) -> "Turn":
        """Its pictures with another question, not yet answered."""
        return replace(self, question=question, replies=[])


def new_turn(turns: Sequence[Turn], question: str, files: Sequence[bytes], sight: Sight | None) -> Turn:
    """The next turn of a conversation, all of it checked; pictures that read_upload refuses are left out of it.

    sight: None for weights without eyes.

    Raises:
        Refused: too long, too many pictures, or none of them that can be used (file_number says which is meant).
    """
    turn = Turn(question, suggestions=turns[-1].suggestions if turns and not files else [])
    if files and sight is None:
        raise Refused("no_eyes")
    if len(files) > limits.MAX_PICTURES:
        raise Refused("too_many_pictures")
    if len(files) + sum(len(turn.pictures) for turn in turns) > limits.MAX_PICTURES_IN_ALL:
        raise Refused("too_many_in_all")
    for number, content in enumerate(files, 1):
        try:
            turn.pictures.append(read_upload(content, sight))
        except Refused as error:
            turn.left_out.append(Refused(error.key, number))
    if turn.left_out and not turn.pictures:  # an answer without the picture would be about nothing
        raise turn.left_out[0]
    return turn


def conversation(turns: Sequence[Turn], side: int = 0) -> tuple[list[dict], list[Image.Image | Frames]]:
    """Messages up to the last turn's question, and the pictures and videos of all of them in order.

    side: 1 for the second model's, which hears its own answers, and the first's where it was not asked.
    """
    messages: list[dict] = []
    for turn in turns:
        messages.append(user_turn(turn.question, len(turn.pictures)))
        if turn is not turns[-1]:
            answer = (turn.replies[-1] if side else turn.replies[0]).answer
            messages.append(assistant_turn(answer.text if answer else ""))
    return messages, [picture.seen for turn in turns for picture in turn.pictures]


@functools.cache
def examples(language: str) -> list[tuple[Image.Image, list[str]]]:
    """The first scenes of a held-out row of Emoji World, with a question of each kind, a different one first."""
    scenes = []
    for index in range(EXAMPLES):
        scene = world.sample_scene(seed=99, split="held_out", index=index, vocabulary=EXAMPLE_CONCEPTS)
        rng = Random(f"example:{index}")
        questions = [words.ask(scene, kind, language, rng, EXAMPLE_CONCEPTS)[0] for kind in words.KINDS]
        scenes.append((world.render(scene)[0], questions[index:] + questions[:index]))
    return scenes


@dataclass
class Chat:
    """One tab's conversation, from one run of the page to the next. Clicks call its methods, and the page shows it."""

    engine: Engine | Remote
    turns: list[Turn] = field(default_factory=list)
    weights: Sequence[Weight] = ()  # who is asked from now on: one model, or two side by side
    options: Options = Options()  # and how
    notice: Refused | None = None  # why the last question was not asked
    draft: str = ""  # its words, which go back into the input
    editing: int | None = None  # the turn whose question is being edited

    @property
    def sight(self) -> Sight | None:
        return self.weights[0].sight

    @property
    def answering(self) -> list[Reply]:
        """The replies that are still to come."""
        return [reply for reply in self.turns[-1].replies if reply.job] if self.turns else []

    def send(self, question: str, files: Sequence[bytes] = (), wordless: str = "") -> None:
        """Ask the next question. wordless: what is asked about files that came without one."""
        with self._refusals_noticed():
            if not question and not files:
                return
            self.draft = question[: limits.MAX_CHARACTERS]
            self._ask([*self.turns, new_turn(self.turns, question or wordless, files, self.sight)])

    def begin_with(self, scene: Image.Image, questions: list[str]) -> None:
        """Ask the first of an example's questions, and suggest the others."""
        with self._refusals_noticed():
            picture = prepare_picture(scene, self.sight)
            self._ask([Turn(questions[0], [picture], world.attribution(), questions)])

    def ask_again(self, number: int, question: str) -> None:
        """A question once more or in other words, of the models chosen now; what came after it goes."""
        with self._refusals_noticed():
            self._ask([*self.turns[:number], self.turns[number].asked_anew(question)])

    def finish(self) -> None:
        """Keep what came of the jobs, which are over."""
        for reply in self.answering:
            reply.answer, reply.failure, reply.job = reply.job.result, reply.job.failure, None

    def stop(self) -> None:
        for reply in self.answering:
            reply.job.stop()

    def clear(self) -> None:
        self.stop()
        self.turns, self.notice, self.draft, self.editing = [], None, "", None

    @contextmanager
    def _refusals_noticed(self) -> Iterator[None]:
        self.notice = None
        try:
            yield
        except Refused as refusal:
            self.notice = refusal

    def _ask(self, turns: list[Turn]) -> None:
        """The last of these turns. Not while a reply is to come: what a page disables can still be sent by hand."""
        if self.answering:
            return
        self.editing = None
        for side, weight in enumerate(self.weights):
            reply = Reply(weight, self.options)
            try:
                reply.job = self.engine.ask(weight, *conversation(turns, side), self.options)
            except Refused as refusal:
                if side == 0:
                    raise
                reply.failure = refusal.key
            turns[-1].replies.append(reply)
        self.turns, self.draft = turns, ""
