"""Our data files as the rows that TRL reads; pictures are opened when a batch needs them."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from transformers import ProcessorMixin

from dataset.exam.questions import Question, question_of
from dataset.options import ReadOptions
from dataset.readers.opening import left_out, open_data
from dataset.samples import BadSample, DataError, Sample
from model.processing import content_parts

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


def read_talks(path: str, options: ReadOptions, count: int, seed: int) -> list[Sample]:
    """So many conversations of a data file of any format, picked at random, or all where there are fewer.

    Lines that cannot be read are left out, and a line on stderr says so.
    """
    samples, talks, bad = open_data(path, options), [], []
    picked = random.Random(seed).sample(range(len(samples)), min(count, len(samples)))
    for number in picked:
        try:
            talk = samples[number]
            talk.refuse_videos("a recipe")
            talks.append(talk)
        except BadSample as error:
            bad.append(error)
    if plain := next((sample for sample in talks if sample.text is not None), None):
        raise DataError(f"{plain.where}: this is plain text, and a recipe tunes on questions with answers")
    if bad:
        print(left_out(bad, len(picked), "lines"), file=sys.stderr)
    return talks


def read_picked(path: str, options: ReadOptions, count: int, seed: int) -> list[Question]:
    """The last question of so many conversations, picked as read_talks picks them."""
    return [question_of(talk) for talk in read_talks(path, options, count, seed)]


def to_messages(messages: Sequence[dict]) -> list[dict]:
    """Messages whose places of pictures are parts, as chat templates want them."""
    spelt = {"image": lambda _: {"type": "image"}, "text": lambda text: {"type": "text", "text": text}}
    return [
        {"role": message["role"], "content": [spelt[kind](text) for kind, text in content_parts(message["content"])]}
        for message in messages
    ]


def to_prompt(processor: ProcessorMixin, messages: Sequence[dict]) -> str:
    """Everything before an answer, as the model reads it, with <image> where a picture goes."""
    return processor.apply_chat_template(to_messages(messages), tokenize=False, add_generation_prompt=True)


def to_rows(items: Sequence[Item], row: Callable[[Item], dict]) -> "Dataset":
    """What `row` makes of each item, when it is asked for: TRL takes no other data sets than those of `datasets`."""
    from datasets import Dataset  # here, as only what trains needs it

    def columns(batch: dict) -> dict:
        made = [row(items[number]) for number in batch["number"]]
        return {name: [one[name] for one in made] for name in made[0]}

    numbers = Dataset.from_dict({"number": range(len(items))})
    numbers.set_transform(columns)
    return numbers
