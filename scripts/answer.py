"""Ask a trained model: one engine for the terminal, the score and whatever else wants answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from model.config import END_ID, END_OF_TEXT_ID, MiniMindConfig
from model.processing import VLMProcessor
from model.weights import load_model

Conversation = tuple[Sequence[dict], Sequence[Image.Image]]  # messages and their pictures, in order


@dataclass(frozen=True)
class Options:
    """How an answer is drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 0.9  # with a temperature: the likeliest tokens that together reach this share; 1: all
    top_k: int = 0  # with a temperature: only so many of the likeliest; 0: all
    seed: int | None = None  # with a temperature: the same seed draws the same answer; None: a new one every time


DEFAULTS = Options()


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]  # as drawn, the one that ended the turn included
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    tokens_per_second: float  # after the first
    stopped: bool = False  # by who asked, before the model had ended


class Interrupted(RuntimeError):
    """Something raised in the middle of an answer; `answer` holds what there was until then, __cause__ says why."""

    def __init__(self, answer: Answer, error: Exception):
        super().__init__(f"the answer broke off after {answer.new_tokens} tokens: {error}")
        self.answer = answer


class Answerer:
    """A model with its processor on a device."""

    def __init__(self, model: torch.nn.Module, device: str | torch.device = "cpu"):
        self.model = model.eval().to(device)
        self.processor = VLMProcessor.for_config(model.config)
        self.device = torch.device(device)

    @classmethod
    def from_weight(cls, path: str | Path, vision_model: str | None = None, device: str = "auto") -> "Answerer":
        """Raises ValueError as load_model does."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(load_model(path, vision_model), device)

    @property
    def config(self) -> MiniMindConfig:
        return self.model.config

    @torch.inference_mode()
    def batch(self, conversations: Sequence[Conversation], options: Options = DEFAULTS) -> list[Answer]:
        """Answers to several conversations at once, in order. Raises SampleError as VLMProcessor.prompts does."""
        inputs = self._inputs(conversations)
        prompt = inputs["input_ids"].shape[1]
        clock = _Clock()
        output = self.model.generate(**inputs, **self._arguments(options), streamer=clock)
        answers = []
        for row, length in zip(output[:, prompt:].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True):
            ended = row.index(END_ID) + 1 if END_ID in row else len(row)
            answers.append(self._answer(row[:ended], length, clock.times))
        return answers

    @torch.inference_mode()
    def stream(
        self,
        messages: Sequence[dict],
        pictures: Sequence[Image.Image] = (),
        options: Options = DEFAULTS,
        show: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """One answer, shown piece by piece while it grows.

        show: gets each new piece of text, whole characters only.
        stopped: asked after every token; True ends the answer there.

        Raises:
            SampleError: the messages and pictures do not fit together.
            Interrupted: `show` raised, or the model did; the text so far is in it, and the engine is ready for more.
        """
        inputs = self._inputs([(messages, pictures)])
        prompt = inputs["input_ids"].shape[1]
        clock = _Clock(lambda tokens: show_new(tokens), stopped)
        pieces: list[str] = []

        def show_new(tokens: list[int]) -> None:
            text = self._decode(tokens)
            whole = text[: len(text.rstrip("\ufffd"))]
            if len(whole) > sum(map(len, pieces)):
                pieces.append(whole[sum(map(len, pieces)) :])
                show(pieces[-1])

        try:
            criteria = StoppingCriteriaList([clock])
            self.model.generate(**inputs, **self._arguments(options), streamer=clock, stopping_criteria=criteria)
            rest = self._decode(clock.tokens)[sum(map(len, pieces)) :]
            if rest:  # a character that the model began and never finished
                show(rest)
        except Exception as error:
            raise Interrupted(self._answer(clock.tokens, prompt, clock.times), error) from error
        return self._answer(clock.tokens, prompt, clock.times, clock.was_stopped)

    def _arguments(self, options: Options) -> dict:
        if not options.temperature:
            return {"max_new_tokens": options.max_new_tokens, "do_sample": False}
        if options.seed is not None:
            torch.manual_seed(options.seed)
        names = ("max_new_tokens", "temperature", "top_p", "top_k")
        return {"do_sample": True, **{name: getattr(options, name) for name in names}}

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def _answer(self, tokens: Sequence[int], prompt: int, times: Sequence[float], stopped: bool = False) -> Answer:
        rest = times[-1] - times[0] if times else 0.0
        return Answer(
            text=self._decode([token for token in tokens if token != END_OF_TEXT_ID]),
            token_ids=tuple(tokens),
            prompt_tokens=prompt,
            new_tokens=len(tokens),
            seconds_to_first=times[0] if times else 0.0,
            tokens_per_second=(len(tokens) - 1) / rest if rest else 0.0,
            stopped=stopped,
        )

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        inputs = self.processor.prompts(conversations)
        if not hasattr(self.model, "vision_encoder"):  # a bare decoder takes no pictures
            inputs.pop("image_mask")
            if inputs.pop("pixel_values", None) is not None:
                raise ValueError("these weights are a decoder without eyes: train the stages, or ask without a picture")
        return {name: value.to(self.device) for name, value in inputs.items()}


class _Clock(BaseStreamer, StoppingCriteria):
    """Notes each token and when it came, in seconds since the start, and asks after each whether to go on."""

    def __init__(
        self, show: Callable[[list[int]], None] = lambda tokens: None, stopped: Callable[[], bool] = lambda: False
    ):
        self.show, self.stopped, self.was_stopped = show, stopped, False
        self.tokens, self.times, self.seen_prompt = [], [], False
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.times.append(time.perf_counter() - self.started)
            self.tokens.append(int(value.view(-1)[0]))
            self.show(self.tokens)
        self.seen_prompt = True

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_kwargs) -> torch.Tensor:
        self.was_stopped = self.was_stopped or self.stopped()
        return torch.full((len(input_ids),), self.was_stopped, device=input_ids.device)
