"""Questions about videos: asked in order, and with the frames shuffled, which tells whether the order was looked at.

The times before the frames stay in order; what is shown at them does not.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from PIL import Image

from dataset.exam.questions import Question
from dataset.samples import Sample
from model.video import is_video
from model.views import Frames, Sight

SHOWN = {"right": "frames in order", "shuffled": "frames shuffled", "none": "no video"}  # by mode, in tables


class Shuffled(Sample):
    """The same sample, whose videos are shown with their frames in another order."""

    def open_shown(self, sight: Sight) -> list[Image.Image | Frames]:
        shown = super().open_shown(sight)
        return [shuffled(one, Path(self.where).name) if isinstance(one, Frames) else one for one in shown]


def about_videos(questions: Sequence[Question]) -> bool:
    """Whether every question is about videos alone."""
    sources = [question.sample.pictures for question in questions]
    return bool(sources) and all(pictures and all(map(is_video, pictures)) for pictures in sources)


def out_of_order(questions: Sequence[Question]) -> list[Question]:
    """The same questions, whose videos are Shuffled."""
    return [replace(question, sample=Shuffled(**vars(question.sample))) for question in questions]


def shuffled(frames: Frames, seed: str) -> Frames:
    """In another order, the same for the same seed: another is seen, unless all frames are alike."""
    contents = [picture.tobytes() for picture in frames.pictures]
    rng, order = Random(f"frames:{seed}"), list(range(len(contents)))
    while len(set(contents)) > 1 and [contents[place] for place in order] == contents:
        rng.shuffle(order)
    return frames._replace(pictures=[frames.pictures[place] for place in order])
