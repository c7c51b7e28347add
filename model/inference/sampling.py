"""Which token comes next, and the text that tokens make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from model.messages import UserError

COLDEST = 1e-30  # a temperature whose inverse float32 still holds; nothing but the likeliest is left far above it
CANDIDATES = 1024  # of a large vocabulary: the likeliest tokens, among which top_p mostly ends
ROUNDING = 1e-4  # of a sum of probabilities
UNFINISHED = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet


@dataclass(frozen=True)
class Options:
    """How an answer is sampled. Raises UserError for what cannot be."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 0.9  # with a temperature: the likeliest tokens whose probabilities together reach this; 1: all
    top_k: int = 0  # with a temperature: only so many of the likeliest; 0: all
    seed: int | None = None  # with a temperature: the same seed gives the same answer; None: a new one every time

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: an answer has at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it is a share, above 0 and up to 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or above")


class Sampler:
    """Samples one token a row, on the logits' device, with random states of its own."""

    def __init__(self, options: Options, device: torch.device, rows: int = 1):
        """rows: each has a random state of its own, and so samples what it would alone."""
        self.options = options
        self.generators = [torch.Generator(device) for _ in range(rows)] if options.temperature else []
        for generator in self.generators:
            generator.seed() if options.seed is None else generator.manual_seed(options.seed)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [rows, vocabulary] -> tokens [rows]."""
        if not self.options.temperature:
            return logits.argmax(-1)
        parts = probabilities(logits, self.options).chunk(len(self.generators))
        sampled = [torch.multinomial(part, 1, generator=g) for part, g in zip(parts, self.generators, strict=True)]
        return torch.cat(sampled)[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other rows."""
        self.generators = [self.generators[row] for row in rows] if self.generators else []


def probabilities(logits: torch.Tensor, options: Options) -> torch.Tensor:
    """[rows, vocabulary], after temperature, then top_k, then top_p (Holtzman et al. 2020); they may sum to less."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(options.temperature, COLDEST)  # the likeliest at 0: no inf
    if 0 < options.top_k < logits.shape[-1]:
        weakest = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    likely = logits.softmax(-1)
    if options.top_p < 1:
        ordered, places = _likeliest(likely, options.top_p)
        beyond = ordered.cumsum(-1) - ordered >= options.top_p  # those before it reach top_p already
        likely = torch.zeros_like(likely).scatter_(-1, places, ordered.masked_fill(beyond, 0.0))
    return likely


def _likeliest(likely: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [rows, n] in falling order, all whose sum with those before reaches top_p first, and their places.

    On a CPU sorting all of 49,152 takes 5 ms a token, a third of what a 135 M model takes for it.
    """
    if likely.device.type == "cpu" and likely.shape[-1] > 4 * CANDIDATES:  # elsewhere the host would have to wait
        ordered, places = likely.topk(CANDIDATES, dim=-1)
        if (ordered.sum(-1) > top_p + ROUNDING).all():
            return ordered, places
    return likely.sort(-1, descending=True)


class GrowingText:
    """Shows the text of tokens as they come, whole characters only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        self.tokenizer, self.show, self.waiting = tokenizer, show, []

    def add(self, token: int) -> None:
        self.waiting.append(token)
        if not decode(self.tokenizer, self.waiting).endswith(UNFINISHED):
            self.flush()

    def flush(self) -> None:
        """Also what never became a character."""
        text, self.waiting = decode(self.tokenizer, self.waiting), []
        if text:
            self.show(text)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
