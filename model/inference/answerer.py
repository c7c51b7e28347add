"""Ask a trained model: one engine for the terminal, the demo, the score and whatever else wants answers.

Answerer.prompt   messages and pictures as the model reads them   reader.py     what is read, and what is remembered
Answerer.stream   an answer that is shown while it grows          decoder.py    the fast decoder; kv_cache.py its state
Answerer.batch    several answers at once                         rows.py       how answers grow, alone or together
Batcher           answers for many who ask when they like         sampling.py   which token comes next
                  (batcher.py)                                    growing_text.py  what is shown of it
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel

from model.device import choose_device, choose_dtype
from model.inference.growing_text import GrowingText
from model.inference.reader import Prompt, PromptReader, Reader
from model.inference.rows import Answer, Draft, Interrupted, Rows, Terms
from model.inference.sampling import Options, Sampler
from model.inference.stock_reader import StockReader, load_folder
from model.inference.window import Forgotten, newest_turns
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.pictures import SampleError
from model.processing import Rendered, VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.views import Cut, Frames
from model.weights import load_model

__all__ = ["Answer", "Answerer", "Interrupted", "Options", "PromptTooLong", "assistant_turn", "user_turn"]
DEFAULTS = Options()


class PromptTooLong(SampleError):
    """The conversation has more tokens than the model reads."""


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
        reader_class = Reader if isinstance(model, MiniMindForCausalLM) else StockReader
        self.reader: PromptReader = reader_class(model, self.device, dtype)
        text_config = getattr(model.config, "text_config", model.config)
        self.max_length, self.end_ids = text_config.max_position_embeddings, _end_ids(model) | {self.processor.end_id}
        self.padding_id = text_config.pad_token_id
        self.window: int | None = None  # tokens of a conversation that are read; None: all, or PromptTooLong

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
        """With the flags of add_weight_flags and add_window_flag. Raises UserError as from_weight and keep_within."""
        answerer = cls.from_weight(
            options.weight, options.vision_model, options.device, options.dtype, options.num_attention_heads
        )
        return answerer.keep_within(getattr(options, "context_window", None))

    def keep_within(self, window: int | None) -> "Answerer":
        """Read of a conversation no more than so many tokens from now on: older turns are forgotten whole. None: all.

        Raises:
            UserError: the model does not read so many.
        """
        if window is not None and not 0 < window < self.max_length:
            raise UserError(
                f"--context_window {window} must lie within 1 and {self.max_length - 1}, what the model reads"
            )
        self.window = window
        return self

    def prompt(self, messages: Sequence[dict], pictures: Sequence[Image.Image | Frames] = ()) -> Prompt:
        """A conversation that ends with a question, as the model reads it. pictures: in the order of their places, and
        videos among them.

        With a window the oldest turns may be missing, which the prompt counts.

        Raises:
            SampleError: messages and pictures do not fit together; PromptTooLong: the model does not read so much, or
                the window is too small for the last turn alone.
            UserError: there are pictures, and the model is a decoder alone.
        """
        started = time.perf_counter()
        cuts = [self.processor.sight.cut(picture) for picture in pictures]
        rendered = self._render(messages, cuts)
        if pictures and not self.reader.sees:
            raise UserError("these weights are a decoder without eyes: train the stages, or ask without a picture")
        forgotten = Forgotten()
        if self.window is not None and len(rendered) > self.window:
            kept, forgotten = newest_turns(
                messages, lambda some, gone: len(self._render(some, cuts[gone.pictures :])) <= self.window
            )
            rendered = self._render(kept, cuts[forgotten.pictures :])
            if len(rendered) > self.window:
                raise PromptTooLong(
                    f"the question alone takes {len(rendered)} tokens, with its pictures and what the system says, and "
                    f"--context_window is {self.window}: ask less at once, or make the window larger"
                )
        if len(rendered) >= self.max_length:
            raise PromptTooLong(
                f"the conversation takes {len(rendered)} tokens and the model reads {self.max_length}: "
                "ask less at once, or begin anew"
            )
        shown = zip(pictures[forgotten.pictures :], cuts[forgotten.pictures :], strict=True)
        views = [view for picture, cut in shown for view in self.processor.views(picture, cut)]
        ids, image_mask = rendered.input_ids.tolist(), rendered.image_mask.tolist()
        return Prompt(ids, image_mask, views, cuts[forgotten.pictures :], time.perf_counter() - started, forgotten)

    def _render(self, messages: Sequence[dict], cuts: Sequence[Cut]) -> Rendered:
        return self.processor.render(messages, True, [cut.headings for cut in cuts])

    @torch.inference_mode()
    def stream(
        self,
        prompt: Prompt,
        options: Options = DEFAULTS,
        show: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """One answer, shown piece by piece while it grows.

        show: gets each new piece of text, whole characters only (a Piece of growing_text.py).
        stopped: asked after every token; True ends the answer there.

        Raises:
            Interrupted: `show` raised, or the model did, or it answers nothing but padding; the text so far is in it,
                and the engine is ready for more.
        """
        draft, rows = self.draft(prompt, options, show, stopped), Rows(self.reader)
        try:
            rows.join([draft])
            while rows:
                rows.step()
        except Exception as error:
            draft.fail(error)
        return draft.answer()

    @torch.inference_mode()
    def batch(self, prompts: Sequence[Prompt], options: Options = DEFAULTS) -> list[Answer]:
        """Answers to several prompts at once, in order; with a seed each is the answer that `stream` gives.

        Raises:
            UserError: an answer is nothing but padding.
        """
        if not prompts:
            return []
        drafts, rows = [self.draft(prompt, options) for prompt in prompts], Rows(self.reader)
        started = time.perf_counter() - sum(prompt.seconds for prompt in prompts)
        for draft in drafts:
            draft.started = started
        rows.join(drafts)
        while rows:
            rows.step()
        for draft in drafts:
            if draft.error:
                raise draft.error
        return [draft.answer() for draft in drafts]

    def draft(
        self,
        prompt: Prompt,
        options: Options,
        show: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Draft:
        """An answer that has not begun, for Rows. show, stopped: as for `stream`."""
        tokenizer = self.processor.tokenizer
        return Draft(
            prompt,
            Terms(tokenizer, self.end_ids, self.padding_id, self.max_length, self.dtype),
            Sampler(options, self.device),
            started=time.perf_counter() - prompt.seconds,
            text=GrowingText(tokenizer, show or (lambda piece: None), options.stop) if show or options.stop else None,
            stopped=stopped,
        )


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that Answerer.from_flags reads; --weight may be None until scripts.demo.weights says which."""
    said = ".safetensors of a stage, MiniMind's .pth, a folder; without it the newest in out/, or what ships"
    parser.add_argument("--weight", type=Path, help=said)
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--num_attention_heads", type=int, default=8, help="of a .pth, which does not say")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


def add_window_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context_window", type=int, help="tokens of a conversation that are read: its oldest turns "
                        "are forgotten whole, with their pictures; without it all is read, or refused")  # fmt: skip


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every token that ends a turn: a stock folder may list several, in its config or for generate()."""
    places = (model.config, getattr(model.config, "text_config", None), getattr(model, "generation_config", None))
    named = [getattr(place, "eos_token_id", None) for place in places]
    lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named if ids is not None]
    return frozenset(token for ids in lists for token in ids)
