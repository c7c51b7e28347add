"""The answers that are wrong, the one that the model was surest of first, and where it looked when it gave them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dataset.exam.answering import prompt_of
from dataset.exam.box_scores import is_found
from dataset.exam.choices import plain
from dataset.exam.questions import Question
from dataset.exam.yes_no import is_yes_no, yes_or_no
from dataset.formats import LETTERS
from model.inference.answerer import Answerer, PromptTooLong
from model.inference.attention_map import look
from model.inference.likelihood import log_likelihoods
from model.model_minimind import MiniMindForCausalLM
from model.progress import progress_over


@dataclass(frozen=True)
class Mistake:
    question: Question  # as it was asked: one with choices without them
    said: str
    truth: str
    sureness: float  # the probability that the model gives just this answer, at temperature 1
    maps: list[torch.Tensor] | None  # of each picture [rows, columns], attention; None: it cannot be had


def wrong_answers(questions: Sequence[Question], records: Sequence[dict]) -> list[tuple[Question, str, str]]:
    """Of each wrong answer what was asked, what was said and what is true, in the order of the questions.

    records: what score, score_boxes, score_choices or score_yes_no made of these questions.
    """
    by_yes_or_no, wrong = is_yes_no(questions), []
    for question, record in zip(questions, records, strict=True):
        said, truth = record["right"], record["truth"]
        if question.choices:
            said, truth = (question.choices[LETTERS.index(letter)] for letter in (said, truth))
            question = plain(question)
        right = yes_or_no(said) == truth.lower() if by_yes_or_no else said == truth
        if not (is_found(record) if "iou" in record else right):
            wrong.append((question, said, truth))
    return wrong


def worst_mistakes(
    answerer: Answerer, questions: Sequence[Question], records: Sequence[dict], count: int
) -> tuple[list[Mistake], int]:
    """The `count` wrong answers that the model was surest of, or all of them, and how many there are."""
    wrong = wrong_answers(questions, records)
    sure = [_sureness(answerer, question, said) for question, said, _ in progress_over(wrong, "wrong ones", "answer")]
    order = sorted(range(len(wrong)), key=lambda number: -sure[number])[:count]
    worst = []
    for number in progress_over(order, "where it looked", "answer"):
        question, said, truth = wrong[number]
        worst.append(Mistake(question, said, truth, sure[number], _maps(answerer, question, said)))
    return worst, len(wrong)


def _sureness(answerer: Answerer, question: Question, said: str) -> float:
    prompt = prompt_of(answerer, question, "right", question)
    try:
        return math.exp(log_likelihoods(answerer, [prompt], [said], with_end=True)[0].total)
    except PromptTooLong:  # an answer that ended where the model's window does
        return 0.0


def _maps(answerer: Answerer, question: Question, said: str) -> list[torch.Tensor] | None:
    """Mean over the answer's tokens and all layers; None without pictures, and for models that are not our own."""
    prompt, processor = prompt_of(answerer, question, "right", question), answerer.processor
    if not prompt.pictures or not isinstance(answerer.model, MiniMindForCausalLM):
        return None
    return look(answerer.model, prompt, processor.encode(said) or processor.end.ids).over_pictures()
