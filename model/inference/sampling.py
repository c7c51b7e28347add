"""Which token comes next, and how likely it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from model.inference.growing_text import TokenLogprob, token_bytes
from model.messages import UserError

COLDEST = 1e-30  # a temperature whose inverse float32 still holds; nothing but the likeliest is left far above it
CANDIDATES = 1024  # of a large vocabulary: the likeliest tokens, among which top_p mostly ends
ROUNDING = 1e-4  # of a sum of probabilities


@dataclass(frozen=True)
class Options:
    """How an answer is sampled. Raises UserError for what cannot be."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 0.9  # with a temperature: the likeliest tokens whose probabilities together reach this; 1: all
    top_k: int = 0  # with a temperature: only so many of the likeliest; 0: all
    seed: int | None = None  # with a temperature: the same seed gives the same answer; None: a new one every time
    stop: tuple[str, ...] = ()  # the text ends before the first of these that it says
    logprobs: int | None = None  # log p of each token and of so many that were likeliest there; None: of none

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: an answer has at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it is a share, above 0 and up to 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or above")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop is {self.stop!r}: it must be a tuple of texts, none of them empty")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError(f"logprobs is {self.logprobs}: it must be 0 (of the sampled tokens alone) or above")


class Sampler:
    """How a row is sampled, with a random state of its own, on the logits' device: so it gets what it would alone."""

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.generator = torch.Generator(device) if options.temperature else None
        if self.generator:
            self.generator.seed() if options.seed is None else self.generator.manual_seed(options.seed)


def sample_each(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """logits [rows, vocabulary] -> tokens [rows], each row by a sampler of its own."""
    tokens, alike = logits.argmax(-1), {}
    for row, sampler in enumerate(samplers):
        if sampler.generator:
            options = sampler.options
            alike.setdefault((options.temperature, options.top_p, options.top_k), []).append(row)
    for rows in alike.values():
        likely = probabilities(logits[rows], samplers[rows[0]].options)
        for row, one in zip(rows, likely, strict=True):
            tokens[row] = torch.multinomial(one, 1, generator=samplers[row].generator)[0]
    return tokens


def token_logprob(logits: torch.Tensor, token: int, count: int, tokenizer: PreTrainedTokenizerBase) -> TokenLogprob:
    """Of the token that followed, and of the `count` likeliest. logits [vocabulary].

    As the model has it, whatever temperature, top_k and top_p made of it: so figures of different requests compare.
    """
    likely = logits.float().log_softmax(-1)
    values, tokens = likely.topk(min(count, len(likely)))
    top = tuple(
        TokenLogprob(other, token_bytes(tokenizer, other), value)
        for other, value in zip(tokens.tolist(), values.tolist(), strict=True)
    )
    return TokenLogprob(token, token_bytes(tokenizer, token), float(likely[token]), top)


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
