"""Answers that grow together, a token each in every step; they join and leave between two steps.

The one loop behind Answerer.stream (one row), Answerer.batch (rows that begin together) and Batcher (that come and go).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from model.inference.growing_text import GrowingText, TokenLogprob, decode, end_of_text
from model.inference.reader import Prompt, PromptReader, RowCache
from model.inference.sampling import Sampler, sample_each, token_logprob
from model.inference.window import Forgotten
from model.messages import UserError, counted

CURE = "ask with --dtype float32; if that says the same, the weights are damaged, copy or train them again"


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]  # as sampled, with the one that ended the turn
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    tokens_per_second: float  # after the first
    ending: str = "end"  # what ended it: "end" of the turn, a "stop" string, its "length", "stopped", or an "error"
    logprobs: tuple[TokenLogprob, ...] = ()  # of each of token_ids, where the options ask for them
    forgotten: Forgotten = Forgotten()  # of the conversation, by the engine's window

    @property
    def stopped(self) -> bool:
        """By whoever asked, before the model had ended."""
        return self.ending == "stopped"

    @property
    def cut(self) -> bool:
        """At the most tokens that were allowed."""
        return self.ending == "length"


class Interrupted(RuntimeError):
    """Something raised in the middle of an answer: `answer` holds what there was until then, __cause__ says why."""

    def __init__(self, answer: Answer, error: Exception):
        super().__init__(f"the answer broke off after {counted(answer.new_tokens, 'tokens')}: {error}")
        self.answer = answer


@dataclass(frozen=True)
class Terms:
    """On which a model answers."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    padding_id: int | None
    max_length: int  # tokens of prompt and answer together
    dtype: torch.dtype


@dataclass
class Draft:
    """An answer that grows token by token until it is over."""

    prompt: Prompt
    terms: Terms
    sampler: Sampler
    started: float  # on the clock of time.perf_counter
    text: GrowingText | None = None  # where it is shown, or may be ended by stop strings
    stopped: Callable[[], bool] = lambda: False
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds from the start to each token
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ending: str = ""  # as in Answer, once it is over
    error: Exception | None = None

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Never raises: what `show` or `stopped` raises ends this answer alone."""
        self.tokens.append(token)
        self.times.append(time.perf_counter() - self.started)
        if logprob:
            self.logprobs.append(logprob)
        try:
            if self.text:
                self.text.add(token, logprob)
            ending = self._ending()
            if ending and self.text:
                self.text.flush()
                ending = "stop" if self.text.stopped else ending
            if ending and self.terms.padding_id not in self.terms.end_ids:
                self._check_padding()
            self.ending = ending
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It ends here, unless it is over already."""
        if not self.ending:
            self.ending, self.error = "error", error

    def answer(self) -> Answer:
        """What there is of it. Raises Interrupted where it failed."""
        text = decode(self.terms.tokenizer, self.tokens)
        stop = end_of_text(text, self.sampler.options.stop)
        rest = self.times[-1] - self.times[0] if self.times else 0.0
        found = Answer(
            text=text[:stop],
            token_ids=tuple(self.tokens),
            prompt_tokens=len(self.prompt.ids),
            new_tokens=len(self.tokens),
            seconds_to_first=self.times[0] if self.times else 0.0,
            tokens_per_second=(len(self.tokens) - 1) / rest if rest else 0.0,
            ending=self.ending,
            logprobs=tuple(self.logprobs),
            forgotten=self.prompt.forgotten,
        )
        if self.error:
            raise Interrupted(found, self.error) from self.error
        return found

    def _ending(self) -> str:
        if self.tokens[-1] in self.terms.end_ids:
            return "end"
        if self.text and self.text.stopped:
            return "stop"
        room = self.terms.max_length - len(self.prompt.ids)
        if len(self.tokens) >= min(self.sampler.options.max_new_tokens, room):
            return "length"
        return "stopped" if self.stopped() else ""

    def _check_padding(self) -> None:
        if all(token == self.terms.padding_id for token in self.tokens):
            count = counted(len(self.tokens), "tokens")
            raise UserError(f"the model says nothing but padding ({count}) in {self.terms.dtype}: {CURE}")


class Rows:
    """Drafts that are not over yet, each a row of one cache."""

    def __init__(self, reader: PromptReader):
        self.reader = reader
        self.drafts: list[Draft] = []
        self.tokens: torch.Tensor | None = None  # [rows], sampled and not read yet
        self.cache: RowCache | None = None

    def __len__(self) -> int:
        return len(self.drafts)

    def join(self, drafts: Sequence[Draft]) -> None:
        """Read prompts and begin their answers. What raises here leaves the other rows as they were."""
        logits, cache = self.reader.start([draft.prompt for draft in drafts])
        tokens = add_tokens(drafts, logits)
        if self.cache is None:
            self.drafts, self.tokens, self.cache = list(drafts), tokens, cache
        else:
            self.cache.join(cache)
            self.drafts, self.tokens = [*self.drafts, *drafts], torch.cat([self.tokens, tokens])
        self._leave()

    def step(self) -> None:
        """A further token for each."""
        self.tokens = add_tokens(self.drafts, self.reader.step(self.tokens, self.cache))
        self._leave()

    def clear(self) -> None:
        self.drafts, self.tokens, self.cache = [], None, None

    def _leave(self) -> None:
        """Answers that are over make room, and are remembered."""
        going = [row for row, draft in enumerate(self.drafts) if not draft.ending]
        if len(going) == len(self.drafts):
            return
        for row, draft in enumerate(self.drafts):
            if draft.ending:
                self.reader.remember(draft.prompt, draft.tokens, self.cache, row)
        if not going:
            self.clear()
            return
        movers = iter(row for row in going if row >= len(going))  # the last fill the holes, so that few rows move
        kept = [next(movers) if self.drafts[row].ending else row for row in range(len(going))]
        self.cache.keep(kept)
        self.drafts, self.tokens = [self.drafts[row] for row in kept], self.tokens[kept]


def add_tokens(drafts: Sequence[Draft], logits: torch.Tensor) -> torch.Tensor:
    """Sample the next token of each draft. logits [drafts, vocabulary] -> tokens [drafts]."""
    broken = logits.isnan().any(-1).tolist()
    if any(broken):
        logits = logits.nan_to_num()  # on a GPU, sampling from NaN would take the whole process down
    tokens = sample_each(logits, [draft.sampler for draft in drafts])
    for row, (draft, token) in enumerate(zip(drafts, tokens.tolist(), strict=True)):
        count = draft.sampler.options.logprobs
        if broken[row]:
            draft.fail(UserError(no_number(draft.terms.dtype)))
        elif not draft.ending:
            likely = None if count is None else token_logprob(logits[row], token, count, draft.terms.tokenizer)
            draft.add(token, likely)
    return tokens


def check_numbers(logits: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises UserError where a model computes NaN in this dtype."""
    if logits.isnan().any():
        raise UserError(no_number(dtype))


def no_number(dtype: torch.dtype) -> str:
    return f"the model computes what is no number in {dtype}: {CURE}"
