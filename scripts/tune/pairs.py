"""Preference pairs from questions: the true answer against a likely false one, and how often a model prefers the truth.

Three sources of false answers, hardest last:
another    what the same question is answered elsewhere in the data: true of another picture
order      the things of a list in another order
own        what the model itself answers wrongly when it samples
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import ProcessorMixin

from dataset.exam.answering import prompt_of
from dataset.exam.questions import Question
from model.inference.answerer import Answerer, Options
from model.inference.likelihood import log_likelihoods
from model.messages import UserError
from model.progress import progress_over
from scripts.tune.rows import to_prompt

SOURCES = ("another", "order", "own")
LISTED = re.compile("(, |、)")
TRIES = 4  # answers that a model samples to one question, until one of them is wrong
BATCH = 48  # questions that are answered at once


@dataclass(frozen=True)
class Pair:
    question: Question
    rejected: str
    source: str

    def row(self, processor: ProcessorMixin) -> dict:
        """For TRL: texts and not messages, so that an answer ends where a model ends it.

        TRL itself would add what the chat template writes behind an answer, a line break that no model has learnt, and
        whose probability would be noise in the loss.
        """
        end = processor.tokenizer.eos_token
        return {
            "prompt": to_prompt(processor, self.question.sample.messages[:-1]),
            "chosen": self.question.truth + end,
            "rejected": self.rejected + end,
            "images": self.question.sample.open_pictures(),
        }


def make_pairs(questions: Sequence[Question], answerer: Answerer, seed: int, sources: Sequence[str]) -> list[Pair]:
    """Up to one pair of each source for each question. Raises UserError where there is none at all."""
    chance = random.Random(seed)
    answers = {
        "another": lambda: _other_answers(questions, chance),
        "order": lambda: [_other_order(question.truth, chance) for question in questions],
        "own": lambda: _own_mistakes(questions, answerer, seed),
    }
    pairs = [
        Pair(question, rejected, source)
        for source in sources
        for question, rejected in zip(questions, answers[source](), strict=True)
        if rejected
    ]
    if not pairs:
        raise UserError("no false answer was found to any question: there is nothing to prefer the true ones to")
    return pairs


def _other_answers(questions: Sequence[Question], chance: random.Random) -> list[str | None]:
    answers: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        answers[question.text].add(question.truth)
    others = [sorted(answers[question.text] - {question.truth}) for question in questions]
    return [chance.choice(other) if other else None for other in others]


def _other_order(truth: str, chance: random.Random) -> str | None:
    things = LISTED.split(truth)  # separators stand between them
    names = things[::2]
    if len(set(names)) < 2:
        return None
    while (shuffled := chance.sample(names, len(names))) == names:
        pass
    return "".join(shuffled[0:1] + [part for pair in zip(things[1::2], shuffled[1:], strict=True) for part in pair])


def _own_mistakes(questions: Sequence[Question], answerer: Answerer, seed: int) -> list[str | None]:
    sampled = zip(questions, sampled_answers(questions, answerer, seed), strict=True)
    return [next((answer for answer in answers if answer != question.truth), None) for question, answers in sampled]


def sampled_answers(questions: Sequence[Question], answerer: Answerer, seed: int) -> list[list[str]]:
    """Of each question TRIES answers at temperature 1."""
    answers: list[list[str]] = [[] for _ in questions]
    for start in progress_over(range(0, len(questions), BATCH), "the model's own answers", "batch"):
        asked = range(start, min(start + BATCH, len(questions)))
        prompts = [prompt_of(answerer, questions[number], "right", questions[number]) for number in asked]
        for attempt in range(TRIES):
            sampled = Options(max_new_tokens=64, temperature=1.0, top_p=1.0, seed=seed + attempt)
            for number, answer in zip(asked, answerer.batch(prompts, sampled), strict=True):
                answers[number].append(answer.text.strip())
    return answers


def preferred(folder: Path, pairs: Sequence[Pair]) -> list[bool]:
    """For each pair whether the model of a folder gives the true answer, with its end, the larger probability.

    The model's own preference. What TRL logs as rewards/accuracies counts the pairs whose margin has grown since the
    start: it begins at 0 whatever the model knows.
    """
    answerer, found = Answerer.from_weight(folder, dtype="float32"), []  # bfloat16 would call close ones equal
    for start in progress_over(range(0, len(pairs), BATCH // 2), "preferences", "batch"):
        asked = pairs[start : start + BATCH // 2]
        prompts = [prompt_of(answerer, pair.question, "right", pair.question) for pair in asked for _ in range(2)]
        texts = [text for pair in asked for text in (pair.question.truth, pair.rejected)]
        likelihoods = log_likelihoods(answerer, prompts, texts, with_end=True)
        found += [true.total > false.total for true, false in zip(likelihoods[::2], likelihoods[1::2], strict=True)]
    return found


def preference(folder: Path, pairs: Sequence[Pair]) -> str:
    """Preference accuracy, over all pairs and by source, as a line to read."""
    found = preferred(folder, pairs)
    by_source = defaultdict(list)
    for pair, is_preferred in zip(pairs, found, strict=True):
        by_source[pair.source].append(is_preferred)
    parts = [f"{source} {sum(which) / len(which):.3f} of {len(which):,}" for source, which in by_source.items()]
    return f"{sum(found) / len(found):.3f} of {len(found):,} pairs ({', '.join(parts)})"
