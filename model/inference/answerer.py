"""Ask a trained model: one engine for the terminal, the demo, the score and whatever else wants answers.

Answerer.stream   one conversation, shown while it grows      model/inference/reader.py   what is read, and remembered
Answerer.batch    several at once                             model/inference/decoder.py   how, fast
                                                              model/inference/sampling.py   which token comes next
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel

from model.config import END_ID
from model.device import choose_device, choose_dtype
from model.inference.reader import Prompt, Reader
from model.inference.sampling import Drawing, GrowingText, Options, decode
from model.inference.stock_reader import StockReader, load_folder
from model.messages import UserError, counted
from model.model_minimind import MiniMindForCausalLM
from model.processing import SampleError, VLMProcessor
from model.weights import load_model

__all__ = ["Answer", "Answerer", "Conversation", "Interrupted", "Options", "assistant_turn", "user_turn"]
Conversation = tuple[Sequence[dict], Sequence[Image.Image]]  # messages and their pictures, in order
DEFAULTS = Options()
ELSE = "ask with --dtype float32; if that says the same, the weights are damaged, copy or train them again"


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
        super().__init__(f"the answer broke off after {counted(answer.new_tokens, 'tokens')}: {error}")
        self.answer = answer


def user_turn(question: str, pictures: int) -> dict:
    """The pictures first and a line break after them, as in training.

    Parts, not a string: an <image>, a control token or a row of @ that a person types stays text.
    """
    text = f"\n{question}" if pictures else question
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant_turn(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class Answerer:
    """A model with its processor on a device. Threads may share it: no state of an answer outlives the call."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        processor: VLMProcessor | None = None,
    ):
        """model: from now on the engine's; on a CPU its tower is packed in place, elsewhere it becomes `dtype`."""
        self.model, self.device, self.dtype = model.eval(), torch.device(device), dtype
        self.processor = processor or VLMProcessor.for_config(model.config)
        ours = isinstance(model, MiniMindForCausalLM)
        self.reader = (Reader if ours else StockReader)(model, self.device, dtype)
        text_config = getattr(model.config, "text_config", model.config)
        self.max_length, self.end_ids = text_config.max_position_embeddings, _end_ids(model)
        self.padding_id = text_config.pad_token_id

    @classmethod
    def from_weight(
        cls,
        path: str | Path,
        vision_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        num_attention_heads: int = 8,
    ) -> "Answerer":
        """path: a file in out/, MiniMind's .pth, or a folder with config.json. num_attention_heads: of a .pth, which
        does not say. Raises UserError as load_model and load_folder do."""
        chosen = choose_device(device)
        arithmetic, processor = choose_dtype(dtype, chosen), None
        if Path(path).is_dir():
            model, processor = load_folder(Path(path), vision_model)
        else:
            model = load_model(path, vision_model, num_attention_heads)
        return cls(model, chosen, arithmetic, processor)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

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
            SampleError: the messages and pictures do not fit together, or are longer than the model reads.
            Interrupted: `show` raised, or the model did, or it answers nothing but padding; the text so far is in it,
                and the engine is ready for more.
        """
        started = time.perf_counter()
        prompt = self._prompt(messages, pictures)
        draw = Drawing(options, self.device)
        text = GrowingText(self.processor.tokenizer, show)
        memory, was_stopped = None, False
        tokens: list[int] = []
        times: list[float] = []
        try:
            logits, memory = self.reader.start([prompt])
            self._check_numbers(logits)
            while True:
                drawn = draw(logits)
                tokens.append(int(drawn))
                times.append(time.perf_counter() - started)
                text.add(tokens[-1])
                if self._ended(tokens, prompt, options):
                    break
                if was_stopped := stopped():
                    break
                logits = self.reader.step(drawn, memory)
            text.flush()
            self._check_said(tokens)
        except Exception as error:
            raise Interrupted(self._answer(tokens, prompt, times), error) from error
        finally:
            if memory is not None:
                self.reader.remember(prompt, tokens, memory)
        return self._answer(tokens, prompt, times, was_stopped)

    @torch.inference_mode()
    def batch(self, conversations: Sequence[Conversation], options: Options = DEFAULTS) -> list[Answer]:
        """Answers to several conversations at once, in order; a seed draws for each what it draws in `stream`.

        Raises:
            SampleError: as `stream` does.
            UserError: an answer is nothing but padding.
        """
        if not conversations:
            return []
        started = time.perf_counter()
        prompts = [self._prompt(*conversation) for conversation in conversations]
        draw = Drawing(options, self.device, len(prompts))
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        logits, memory = self.reader.start(prompts)
        self._check_numbers(logits)
        rows, going = list(range(len(prompts))), set(range(len(prompts)))  # rows of the memory; those not ended
        while True:
            drawn = draw(logits)
            now = time.perf_counter() - started
            for row, token in zip(rows, drawn.tolist(), strict=True):
                if row in going:
                    tokens[row].append(token)
                    times[row].append(now)
                    if self._ended(tokens[row], prompts[row], options):
                        going.discard(row)
            if not going:
                for row in tokens:
                    self._check_said(row)
                return [self._answer(*facts) for facts in zip(tokens, prompts, times, strict=True)]
            if 2 * len(going) <= len(rows):  # fewer rows are cheaper, but moving them costs too
                places = [place for place, row in enumerate(rows) if row in going]
                kept = torch.tensor(places, device=self.device)
                rows, drawn = [row for row in rows if row in going], drawn[kept]
                memory.keep(kept)
                draw.keep(places)
            logits = self.reader.step(drawn, memory)

    def _prompt(self, messages: Sequence[dict], pictures: Sequence[Image.Image]) -> Prompt:
        rendered = self.processor.render(messages, add_generation_prompt=True)
        self.processor.check_pictures(rendered, len(pictures))
        if pictures and not self.reader.sees:
            raise UserError("these weights are a decoder without eyes: train the stages, or ask without a picture")
        if len(rendered.input_ids) >= self.max_length:
            raise SampleError(
                f"the conversation takes {len(rendered.input_ids)} tokens and the model reads {self.max_length}: "
                "ask less at once, or begin anew"
            )
        pixels = [self.processor.pixels(picture) for picture in pictures]
        return Prompt(rendered.input_ids, rendered.image_mask, pixels)

    def _ended(self, tokens: Sequence[int], prompt: Prompt, options: Options) -> bool:
        room = min(options.max_new_tokens, self.max_length - len(prompt.ids))
        return tokens[-1] in self.end_ids or len(tokens) >= room

    def _check_numbers(self, logits: torch.Tensor) -> None:
        """Before the first token is drawn: of what is no number a GPU's draw would take the whole process down."""
        if logits.isnan().any():
            raise UserError(f"the model computes what is no number in {self.dtype}: {ELSE}")

    def _check_said(self, tokens: Sequence[int]) -> None:
        if self.padding_id not in self.end_ids and all(token == self.padding_id for token in tokens):
            raise UserError(f"the model says nothing but padding ({len(tokens)} tokens) in {self.dtype}: {ELSE}")

    def _answer(self, tokens: list[int], prompt: Prompt, times: Sequence[float], stopped: bool = False) -> Answer:
        rest = times[-1] - times[0] if times else 0.0
        return Answer(
            text=decode(self.processor.tokenizer, tokens),
            token_ids=tuple(tokens),
            prompt_tokens=len(prompt.ids),
            new_tokens=len(tokens),
            seconds_to_first=times[0] if times else 0.0,
            tokens_per_second=(len(tokens) - 1) / rest if rest else 0.0,
            stopped=stopped,
        )


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every token that ends a turn: a stock folder may list several, in its config or for generate()."""
    places = (model.config, getattr(model.config, "text_config", None), getattr(model, "generation_config", None))
    found = [getattr(place, "eos_token_id", None) for place in places]
    lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in found if ids is not None]
    return frozenset(number for ids in lists for number in ids) or frozenset([END_ID])
