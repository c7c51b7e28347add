"""Ask a model every question: with its picture, with another line's, and with none."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.boxes import boxes_in
from dataset.exam.figures import MODES, summarize
from dataset.exam.questions import Question, wrong_pictures
from model.inference.answerer import Answerer, Options
from model.inference.reader import Prompt
from model.processing import IMAGE_TAG
from model.progress import progress_over

BRIEF = Options(max_new_tokens=64)  # answers of this kind of data are short
BOXES = Options(max_new_tokens=256)  # but for lists of boxes: a box is some 16 tokens, and its name more


def prompt_of(answerer: Answerer, question: Question, mode: str, shown: Question) -> Prompt:
    """The question as the model gets it: with the pictures of `shown`, or with none."""
    messages = question.sample.messages[:-1]
    if mode != "none":
        return answerer.prompt(messages, shown.sample.open_shown(answerer.processor.sight))
    return answerer.prompt([{**m, "content": m["content"].replace(IMAGE_TAG, "").strip()} for m in messages])


def answer_all(
    answerer: Answerer, questions: Sequence[Question], mode: str, wrong: Sequence[Question | None], batch_size: int,
    silent: bool = False,
) -> list[str | None]:  # fmt: skip
    """The answer to each question; None where `wrong`, of wrong_pictures, has nothing to shuffle with.

    silent: show no progress.
    """
    shown = wrong if mode == "shuffled" else questions
    options = BOXES if any(boxes_in(question.truth) for question in questions) else BRIEF
    answers: list[str | None] = [None] * len(questions)
    for numbers in batches(shown, batch_size, mode, silent):
        prompts = [prompt_of(answerer, questions[number], mode, shown[number]) for number in numbers]
        for number, answer in zip(numbers, answerer.batch(prompts, options), strict=True):
            answers[number] = answer.text.strip()
    return answers


def batches(shown: Sequence[Question | None], batch_size: int, label: str, silent: bool = False) -> Iterator[list[int]]:
    """Numbers of the questions that are asked, those about one picture together: the engine then reads it once.

    shown: whose pictures each gets; None: it is not asked. label: of the bar.
    """
    places: dict[tuple, int] = {}
    asked = [number for number, question in enumerate(shown) if question]
    asked.sort(key=lambda number: places.setdefault(shown[number].sample.pictures, len(places)))
    for start in progress_over(range(0, len(asked), batch_size), label, "batch", silent):
        yield asked[start : start + batch_size]


def record_of(question: Question) -> dict:
    """What --answers says of a question, before any answer."""
    return {
        "where": question.sample.where,
        "pictures": [str(picture) for picture in question.sample.pictures if isinstance(picture, Path)],
        "kind": question.kind,
        "language": question.language,
        "question": question.text,
        "truth": question.truth,
    }


def score(
    answerer: Answerer, questions: Sequence[Question], batch_size: int = 48,
    wrong: Sequence[Question | None] | None = None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """The report, and one record a question with every mode's answer. wrong: whose pictures are shown in the mode
    `shuffled`; by default another line's."""
    wrong = wrong or wrong_pictures(questions)
    answers = {mode: answer_all(answerer, questions, mode, wrong, batch_size) for mode in MODES}
    records = [
        record_of(question) | {mode: texts[number] for mode, texts in answers.items()}
        for number, question in enumerate(questions)
    ]
    return summarize(questions, answers), records
