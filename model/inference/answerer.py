"""Ask a trained model: one engine for the terminal, the demo, the score and whatever else wants answers.

Answerer.prompt   messages and pictures as the model reads them   reader.py     what is read, and what is remembered
Answerer.stream   an answer that is shown while it grows          decoder.py    the fast decoder; kv_cache.py its state
Answerer.batch    several answers at once                         sampling.py   which token comes next
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel

from model.device import choose_device, choose_dtype
from model.inference.reader import Prompt, PromptReader, Reader, RowCache
from model.inference.sampling import GrowingText, Options, Sampler, decode
from model.inference.stock_reader import StockReader, load_folder
from model.messages import UserError, counted
from model.model_minimind import MiniMindForCausalLM
from model.processing import SampleError, VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.weights import load_model

__all__ = ["Answer", "Answerer", "Interrupted", "Options", "PromptTooLong", "assistant_turn", "user_turn"]
DEFAULTS = Options()
CURE = "ask with --dtype float32; if that says the same, the weights are damaged, copy or train them again"


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]  # as sampled, with the one that ended the turn
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    tokens_per_second: float  # after the first
    stopped: bool = False  # by whoever asked, before the model had ended
    cut: bool = False  # at the most tokens that were allowed


class PromptTooLong(SampleError):
    """The conversation has more tokens than the model reads."""


class Interrupted(RuntimeError):
    """Something raised in the middle of an answer: `answer` holds what there was until then, __cause__ says why."""

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


@dataclass
class _Draft:
    """An answer that grows token by token until it has ended."""

    prompt: Prompt
    most: int  # tokens
    end_ids: frozenset[int]
    started: float  # on the clock of time.perf_counter
    text: GrowingText | None = None  # where it is shown
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds from the start to each token

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.times.append(time.perf_counter() - self.started)
        if self.text:
            self.text.add(token)

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and (self.tokens[-1] in self.end_ids or len(self.tokens) >= self.most)


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
        reader_class = Reader if isinstance(model, MiniMindForCausalLM) else StockReader
        self.reader: PromptReader = reader_class(model, self.device, dtype)
        text_config = getattr(model.config, "text_config", model.config)
        self.max_length, self.end_ids = text_config.max_position_embeddings, _end_ids(model) | {self.processor.end_id}
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
        chosen, processor = choose_device(device), None
        if Path(path).is_dir():
            model, processor = load_folder(Path(path), vision_model)
        else:
            model = load_model(path, vision_model, num_attention_heads)
            processor = VLMProcessor.for_config(model.config, read_tokenizer(path))
        return cls(model, chosen, choose_dtype(dtype, chosen), processor)

    @classmethod
    def from_flags(cls, options: argparse.Namespace) -> "Answerer":
        """With the flags of add_weight_flags. Raises UserError as from_weight does."""
        return cls.from_weight(
            options.weight, options.vision_model, options.device, options.dtype, options.num_attention_heads
        )

    def prompt(self, messages: Sequence[dict], pictures: Sequence[Image.Image] = ()) -> Prompt:
        """A conversation that ends with a question, as the model reads it. pictures: in the order of their places.

        Raises:
            SampleError: messages and pictures do not fit together; PromptTooLong: the model does not read so much.
            UserError: there are pictures, and the model is a decoder alone.
        """
        started = time.perf_counter()
        rendered = self.processor.render(messages, add_generation_prompt=True)
        self.processor.check_pictures(rendered, len(pictures))
        if pictures and not self.reader.sees:
            raise UserError("these weights are a decoder without eyes: train the stages, or ask without a picture")
        if len(rendered.input_ids) >= self.max_length:
            raise PromptTooLong(
                f"the conversation takes {len(rendered.input_ids)} tokens and the model reads {self.max_length}: "
                "ask less at once, or begin anew"
            )
        pixels = [self.processor.pixels(picture) for picture in pictures]
        return Prompt(rendered.input_ids.tolist(), rendered.image_mask.tolist(), pixels, time.perf_counter() - started)

    @torch.inference_mode()
    def stream(
        self,
        prompt: Prompt,
        options: Options = DEFAULTS,
        show: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """One answer, shown piece by piece while it grows.

        show: gets each new piece of text, whole characters only.
        stopped: asked after every token; True ends the answer there.

        Raises:
            Interrupted: `show` raised, or the model did, or it answers nothing but padding; the text so far is in it,
                and the engine is ready for more.
        """
        (draft,) = self._drafts([prompt], options)
        draft.text, cache = GrowingText(self.processor.tokenizer, show), None
        try:
            logits, cache = self.reader.start([prompt])
            self._grow([draft], logits, cache, options, stopped)
            draft.text.flush()
        except Exception as error:
            raise Interrupted(self._answer(draft), error) from error
        finally:
            if cache is not None:
                self.reader.remember(prompt, draft.tokens, cache)
        return self._answer(draft, stopped=not draft.ended)

    @torch.inference_mode()
    def batch(self, prompts: Sequence[Prompt], options: Options = DEFAULTS) -> list[Answer]:
        """Answers to several prompts at once, in order; with a seed each is the answer that `stream` gives.

        Raises:
            UserError: an answer is nothing but padding.
        """
        if not prompts:
            return []
        drafts = self._drafts(prompts, options)
        logits, cache = self.reader.start(prompts)
        self._grow(drafts, logits, cache, options)
        return [self._answer(draft) for draft in drafts]

    def _drafts(self, prompts: Sequence[Prompt], options: Options) -> list[_Draft]:
        started = time.perf_counter() - sum(prompt.seconds for prompt in prompts)
        rooms = [min(options.max_new_tokens, self.max_length - len(prompt.ids)) for prompt in prompts]
        return [_Draft(prompt, room, self.end_ids, started) for prompt, room in zip(prompts, rooms, strict=True)]

    def _grow(
        self,
        drafts: list[_Draft],
        logits: torch.Tensor,
        cache: RowCache,
        options: Options,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Sample token after token, until each draft has ended or it is `stopped`. logits: [drafts, vocabulary]."""
        check_numbers(logits, self.dtype)  # on a GPU, sampling from NaN would take the whole process down
        sampler = Sampler(options, self.device, len(drafts))
        rows = drafts  # in the cache: all that have not ended, and some that have
        while True:
            tokens = sampler.sample(logits)
            for draft, token in zip(rows, tokens.tolist(), strict=True):
                if not draft.ended:
                    draft.add(token)
            going = [row for row, draft in enumerate(rows) if not draft.ended]
            if not going or stopped():
                break
            if 2 * len(going) <= len(rows):  # fewer rows are cheaper, but moving them costs too
                kept = torch.tensor(going, device=self.device)
                rows, tokens = [rows[row] for row in going], tokens[kept]
                cache.keep(kept)
                sampler.keep(going)
            logits = self.reader.step(tokens, cache)
        for draft in drafts:
            if self.padding_id not in self.end_ids and all(token == self.padding_id for token in draft.tokens):
                count = len(draft.tokens)
                raise UserError(f"the model says nothing but padding ({count} tokens) in {self.dtype}: {CURE}")

    def _answer(self, draft: _Draft, stopped: bool = False) -> Answer:
        tokens, times = draft.tokens, draft.times
        rest = times[-1] - times[0] if times else 0.0
        return Answer(
            text=decode(self.processor.tokenizer, tokens),
            token_ids=tuple(tokens),
            prompt_tokens=len(draft.prompt.ids),
            new_tokens=len(tokens),
            seconds_to_first=times[0] if times else 0.0,
            tokens_per_second=(len(tokens) - 1) / rest if rest else 0.0,
            stopped=stopped,
            cut=not stopped and tokens[-1:] != [] and tokens[-1] not in draft.end_ids,
        )


def check_numbers(logits: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises UserError where a model computes NaN in this dtype."""
    if logits.isnan().any():
        raise UserError(f"the model computes what is no number in {dtype}: {CURE}")


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that Answerer.from_flags reads."""
    parser.add_argument("--weight", type=Path, required=True, help=".safetensors of a stage, MiniMind's .pth, a folder")
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--num_attention_heads", type=int, default=8, help="of a .pth, which does not say")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every token that ends a turn: a stock folder may list several, in its config or for generate()."""
    places = (model.config, getattr(model.config, "text_config", None), getattr(model, "generation_config", None))
    named = [getattr(place, "eos_token_id", None) for place in places]
    lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named if ids is not None]
    return frozenset(token for ids in lists for token in ids)
