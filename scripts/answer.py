"""Ask a trained model: one engine for the terminal, the score and whatever else wants answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from model.config import MiniMindConfig
from model.processing import VLMProcessor
from model.weights import load_model

Conversation = tuple[Sequence[dict], Sequence[Image.Image]]  # messages and their pictures, in order


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    tokens_per_second: float  # after the first


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
    def batch(self, conversations: Sequence[Conversation], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to several conversations at once. Raises SampleError as VLMProcessor.prompts does."""
        inputs = self._inputs(conversations)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)

    @torch.inference_mode()
    def stream(
        self,
        messages: Sequence[dict],
        pictures: Sequence[Image.Image] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.9,
        show: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """One answer, shown piece by piece while it grows. temperature 0 is greedy."""
        inputs = self._inputs([(messages, pictures)])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        streamer = _Streamer(self.processor.tokenizer, show)
        self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        first, count = streamer.times[0], len(streamer.times)
        rest = streamer.times[-1] - first
        return Answer(
            text="".join(streamer.pieces),
            prompt_tokens=inputs["input_ids"].shape[1],
            new_tokens=count,
            seconds_to_first=first,
            tokens_per_second=(count - 1) / rest if rest else 0.0,
        )

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        inputs = self.processor.prompts(conversations)
        if not hasattr(self.model, "vision_encoder"):  # a bare decoder takes no pictures
            inputs.pop("image_mask")
            if inputs.pop("pixel_values", None) is not None:
                raise ValueError("these weights are a decoder without eyes: train the stages, or ask without a picture")
        return {name: value.to(self.device) for name, value in inputs.items()}


class _Streamer(TextStreamer):
    """Hands on the text as it grows and notes when each token came, in seconds since the start."""

    def __init__(self, tokenizer, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.pieces, self.times = show, [], []
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter() - self.started)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.show(text)
