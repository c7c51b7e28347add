"""Exams while training: what the model answers between two steps to questions of files, and which weights are best.

The engine that answers makes a model its own: it packs the tower, casts the rest, and leaves it in eval mode. So it
gets a twin, made anew each time: modules of its own around the very tensors that learn. What trains is not touched, and
what wraps it (DDP, FSDP, torch.compile) the twin has not. It takes, until the exams are over, the engine's packed
layouts of the weights, and with --shard 1 all of the weights on every rank.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.exam.answering import answer_all
from dataset.exam.box_scores import judged
from dataset.exam.choices import likeliest_texts
from dataset.exam.figures import summarize
from dataset.exam.questions import Question, read_questions
from dataset.options import AUTO
from dataset.readers.opening import is_there
from dataset.sources import named_files
from model.config import MiniMindConfig
from model.inference.answerer import Answerer
from model.messages import UserError, counted, did_you_mean, plain
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor
from trainer.config import StageConfig
from trainer.distributed import Runtime, full_tensors
from trainer.run import Run

FLAG = "--eval_tasks"
RIGHT = "right"  # the question's own picture: what a run wants to know; scripts/score.py asks without it, too
BATCH, BATCH_OF_CHOICES = 48, 16  # questions that are answered at once, as scripts/score.py does


@dataclass(frozen=True)
class Exam:
    """The questions of a file, by its name."""

    name: str
    weight: float
    questions: list[Question]


@dataclass(frozen=True)
class Exams:
    """All exams of a run; `identity` tells them from others, with whose figures theirs cannot be compared."""

    each: tuple[Exam, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.each)

    @property
    def identity(self) -> str:
        asked = [[exam.name, exam.weight, [(q.text, q.truth) for q in exam.questions]] for exam in self.each]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


NO_EXAMS = Exams()


@dataclass(frozen=True)
class Marks:
    """What the exams of a step came to."""

    mean: float  # of the exams' exact matches, by their weights
    reports: dict[str, dict]  # by the exam's name: what dataset.exam.figures.summarize says

    def record(self) -> dict[str, float]:
        """For the log: the mean, each exam, and of an exam with several kinds of questions each kind."""
        record = {"exam": self.mean}
        for name, report in self.reports.items():
            record[f"exam/{name}"] = report["exact_match"][RIGHT]
            kinds = {kind: figures[RIGHT]["exact_match"] for kind, figures in report["by_kind"].items()}
            record |= {f"exam/{name}/{kind}": match for kind, match in kinds.items() if len(kinds) > 1}
        return record

    def status(self) -> dict[str, dict]:
        """For status.json: of each exam the exact match, the interval of all questions, and how many they are."""
        marks = {name: {**report["all"][RIGHT], "exact_match": report["exact_match"][RIGHT]}
                 for name, report in self.reports.items()}  # fmt: skip
        return {"mean": self.mean, "each": marks}

    def __str__(self) -> str:
        each = self.status()["each"].items()
        return ", ".join(
            f"{name} {mark['exact_match']:.4f} of {counted(mark['count'], 'questions')}" for name, mark in each
        )


class ExamFailed(Exception):
    """An exam came to nothing, on every rank alike; the message says on which, and why."""


def read_exams(config: StageConfig, model_config: MiniMindConfig, processor: VLMProcessor, runtime: Runtime) -> Exams:
    """The exams of --eval_tasks; rank 0 reads them for all ranks.

    Raises:
        UserError: a file cannot be read, has no question that can be asked, or one that this model cannot take.
    """

    def read() -> Exams:
        files = [(source.path, source.weight or 1.0) for source in named_files(config.eval_tasks, FLAG) if source.path]
        exams = [Exam(_name(path, files), weight, _questions(path, config)) for path, weight in files]
        for exam in exams:
            _check(exam, config.with_vision, model_config.max_position_embeddings, processor)
            runtime.print0(f"exam {exam.name}: {counted(len(exam.questions), 'questions')}")
        return Exams(tuple(exams))

    return runtime.from_main(read)


def _name(path: str, files: Sequence[tuple[str, float]]) -> str:
    """The file's name without its ending; with its folder's before it where two files would have the same."""
    path = Path(path)
    alike = [other for other, _ in files if Path(other).stem == path.stem]
    return path.stem if len(alike) == 1 else f"{path.parent.name}-{path.stem}"


def _questions(path: str, config: StageConfig) -> list[Question]:
    if not is_there(path):
        raise UserError(f"{FLAG} {path} does not exist{did_you_mean(path)}")
    options = replace(config.read_options, data_format=AUTO, max_samples=0, min_rating=0)
    try:
        questions = read_questions(Path(path), options, spread=config.eval_samples)
    except (UserError, OSError) as error:
        raise UserError(f"{FLAG}: {error}") from error
    if not questions:
        raise UserError(f"{FLAG} {path} holds no question: an exam is lines that end in a question and its answer")
    return questions


def _check(exam: Exam, with_vision: bool, most: int, processor: VLMProcessor) -> None:
    """Raises UserError over what could not be asked at any step. most: tokens that the model reads."""
    if 0 < sum(bool(question.choices) for question in exam.questions) < len(exam.questions):
        raise UserError(f"{FLAG}: some questions of {exam.name} have choices, others none: give two files")
    for question in exam.questions:
        if question.sample.pictures and not with_vision:
            raise UserError(
                f"{FLAG}: {question.sample.where} shows a picture, and this stage trains a decoder without eyes: give "
                "exams in words alone, or leave the flag to the stages that see"
            )
        tokens = len(processor.render(question.sample.messages[:-1], add_generation_prompt=True).input_ids)
        if tokens >= most:
            raise UserError(
                f"{FLAG}: {question.sample.where} asks in {tokens:,} tokens and the model reads {most:,}: shorten it, "
                "or leave it out"
            )


@torch.no_grad()
def take_exams(run: Run, exams: Exams, processor: VLMProcessor) -> Marks:
    """What the model answers now. Every rank calls and asks its part of the questions: one that asked them all would
    let the others wait longer than ranks wait for each other.

    Raises:
        ExamFailed: something went wrong on a rank, whatever it was; training can go on.
    """
    runtime, answers, reason = run.runtime, [], None
    tensors = full_tensors(run.model.state_dict().items(), keep=True)  # before `try`, as all ranks must take part
    try:
        answerer = Answerer(twin_of(run.model, tensors), runtime.device, runtime.dtype, processor)
        for exam in exams.each:
            answers.append(_answers(answerer, exam.questions[runtime.rank :: runtime.world_size]))
    except Exception as error:  # a picture that is gone, no memory, weights that compute no number: not worth a run
        reason = f"{type(error).__name__}: {error}"
    everybody = runtime.gather((answers, reason))
    for rank, (_, reason) in enumerate(everybody):
        if reason is not None:
            raise ExamFailed(plain(f"on rank {rank}, {reason}" if runtime.world_size > 1 else reason))
    reports = {}
    for number, exam in enumerate(exams.each):
        texts: list = [None] * len(exam.questions)
        for rank, (parts, _) in enumerate(everybody):
            texts[rank :: runtime.world_size] = parts[number]
        reports[exam.name] = summarize(exam.questions, {RIGHT: judged(exam.questions, texts)})
    total = sum(exam.weight * reports[exam.name]["exact_match"][RIGHT] for exam in exams.each)
    return Marks(round(total / sum(exam.weight for exam in exams.each), 6), reports)


def _answers(answerer: Answerer, questions: Sequence[Question]) -> list[str | None]:
    """The one place that asks, whatever an exam is of: questions are answered, of choices the likeliest is taken."""
    if questions and questions[0].choices:
        return likeliest_texts(answerer, questions, BATCH_OF_CHOICES)
    return answer_all(answerer, questions, RIGHT, (), BATCH, silent=True)


def twin_of(model: MiniMindForCausalLM, tensors: dict[str, torch.Tensor]) -> MiniMindForCausalLM:
    """Modules like the model's, as they were before anything wrapped them, around these tensors and its own buffers.

    Nothing is copied, and nothing is drawn from a random generator: modules on `meta` have no values.
    """
    with torch.device("meta"):
        twin = (MiniMindVLM if isinstance(model, MiniMindVLM) else MiniMindForCausalLM)(model.config)
    twin.load_state_dict(tensors, assign=True)
    for name, buffer in model.named_buffers():  # some are in no state_dict
        place, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(place), leaf, buffer)
    return twin.requires_grad_(False)
